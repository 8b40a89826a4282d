//! Texts for users: errors and lines of build logs. Secrets of the deployment and paths of this host are removed.

use capsule_runtime::Mask;

use crate::DeployService;
use crate::deployments::{self, Row};

/// Directories below the data directory, and the words that replace a path in them. The entries of each are named by an
/// id, which is removed as well.
const DIRECTORIES: [(&str, &str); 8] = [
    ("layers", "the layers of /app"),
    ("releases", "the release directory"),
    ("work", "the build directory"),
    ("logs/deployments", "the build log"),
    ("logs/instances", "the log"),
    ("blobs", "the upload"),
    ("run/i", "the socket"),
    ("apps", "the application's directory"),
];

/// Masks the secrets of a deployment.
pub fn mask(service: &DeployService, row: &Row) -> Mask {
    // If the snapshot cannot be decrypted, its secrets cannot be in a text either.
    deployments::environment(service, row).map(|environment| Mask::new(environment.values())).unwrap_or_default()
}

/// Removes secrets and paths from a text about a deployment.
pub fn for_users(service: &DeployService, row: &Row, text: &str) -> String {
    without_paths(service, &mask(service, row).text(text))
}

/// Replaces the paths of this host in a text.
pub fn without_paths(service: &DeployService, text: &str) -> String {
    let text = replace_paths(text, &service.options.data.to_string_lossy());
    let text = replace_cgroups(&text);
    text.replace(&*service.options.program.to_string_lossy(), "capsule")
}

fn replace_paths(text: &str, data: &str) -> String {
    let (mut shown, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(at) = rest.find(data).filter(|_| !data.is_empty()) {
        shown.push_str(&rest[..at]);
        rest = &rest[at + data.len()..];
        let inner = rest.strip_prefix('/').unwrap_or_default();
        let found =
            DIRECTORIES.iter().find_map(|(directory, name)| Some((name, inner.strip_prefix(directory)?.strip_prefix('/')?)));
        match found {
            // The next component is an id.
            Some((name, after)) => {
                let id = after.find(|c: char| !c.is_ascii_alphanumeric() && c != '-' && c != '.').unwrap_or(after.len());
                shown.push_str(name);
                rest = &after[id..];
            }
            None => shown.push_str("the data directory"),
        }
    }
    shown.push_str(rest);
    shown
}

/// Replaces paths of control groups, which reveal how the host is set up.
fn replace_cgroups(text: &str) -> String {
    let (mut shown, mut rest) = (String::with_capacity(text.len()), text);
    while let Some(at) = rest.find("/sys/fs/cgroup") {
        shown.push_str(&rest[..at]);
        shown.push_str("the control group");
        let path = &rest[at..];
        rest = &path[path.find(|c: char| c.is_whitespace() || ":,;`'\")".contains(c)).unwrap_or(path.len())..];
    }
    shown.push_str(rest);
    shown
}

#[cfg(test)]
mod tests {
    use super::{replace_cgroups, replace_paths};

    #[test]
    fn paths_of_the_host_are_replaced_by_a_description() {
        for (text, expected) in [
            ("/var/lib/capsule/releases/0199-ab/app: not found", "the release directory/app: not found"),
            ("`/var/lib/capsule/work/0199-ab/source/a.txt` and /app", "`the build directory/source/a.txt` and /app"),
            ("a /var/lib/capsule/run/i/i12ab.sock: gone", "a the socket: gone"),
            ("/var/lib/capsule/keys/master.key", "the data directory/keys/master.key"),
            ("/var/lib/capsule/releases", "the data directory/releases"),
            ("/var/lib/capsule, /var/lib/capsule/blobs/00ff", "the data directory, the upload"),
            ("nothing", "nothing"),
        ] {
            assert_eq!(replace_paths(text, "/var/lib/capsule"), expected);
        }
        assert_eq!(replace_paths("x", ""), "x");
        assert_eq!(
            replace_cgroups("not enforced: /sys/fs/cgroup/capsule.slice/a: denied"),
            "not enforced: the control group: denied"
        );
    }
}
