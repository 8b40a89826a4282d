//! Which files a static site publishes: all but hidden files, files that hold keys, and files for the platform. The rule
//! is applied when a site is copied, when it is served, and in the Dockerfile of a site.

use std::ffi::OsStr;
use std::path::{Component, Path};

/// The one hidden folder that is public (RFC 8615).
pub const WELL_KNOWN: &str = ".well-known";

/// The folder of npm's packages.
pub const PACKAGES_FOLDER: &str = "node_modules";

/// Names of files for the tools that build and host a site, not for its visitors.
pub const TOOL_FILES: [&str; 26] = [
    "_headers",
    "_redirects",
    "_routes.json",
    "_worker.js",
    "app.yaml",
    "caddyfile",
    "capsule.toml",
    "compose.yaml",
    "compose.yml",
    "containerfile",
    "docker-compose.yaml",
    "docker-compose.yml",
    "dockerfile",
    "firebase.json",
    "fly.toml",
    "heroku.yml",
    "netlify.toml",
    "node_modules",
    "now.json",
    "procfile",
    "railway.json",
    "railway.toml",
    "render.yaml",
    "staticwebapp.config.json",
    "vercel.json",
    "wrangler.toml",
];
/// So begin the names of their variants: `Dockerfile.dev`.
pub const TOOL_FILE_VARIANTS: [&str; 4] = ["containerfile.", "docker-compose.", "dockerfile.", "procfile."];
/// A page about such a file is one.
pub const PAGES: [&str; 12] = ["css", "htm", "html", "jpg", "js", "md", "pdf", "png", "svg", "txt", "webp", "xml"];
/// Names of private keys and of files with credentials.
pub const KEY_FILES: [&str; 13] = [
    "_netrc",
    "credentials",
    "credentials.csv",
    "credentials.json",
    "deploy_key",
    "htpasswd",
    "id_xmss",
    "kubeconfig",
    "netrc",
    "secring.gpg",
    "service-account.json",
    "serviceaccount.json",
    "serviceaccountkey.json",
];
/// So begin the names of keys and of credentials of applications; what ends in `.pub` is public.
pub const KEY_PREFIXES: [&str; 8] =
    ["client_secret", "id_dsa.", "id_ecdsa.", "id_ecdsa_sk.", "id_ed25519.", "id_ed25519_sk.", "id_rsa.", "ssh_host_"];
/// So begin the names of keys that are named for what they are for: `id_rsa_github`. Pages are about them.
pub const NAMED_KEY_PREFIXES: [&str; 4] = ["id_dsa", "id_ecdsa", "id_ed25519", "id_rsa"];
/// In the name of the file that holds the key of a Firebase project.
pub const FIREBASE_KEY: &str = "-firebase-adminsdk-";
/// Endings of the names of keys, keystores, stores of passwords, and files of tools that hold credentials.
pub const KEY_ENDINGS: [&str; 24] = [
    "agekey",
    "bks",
    "env",
    "htpasswd",
    "jceks",
    "jks",
    "kdb",
    "kdbx",
    "key",
    "keystore",
    "keytab",
    "kubeconfig",
    "netrc",
    "ovpn",
    "p12",
    "p8",
    "pem",
    "pfx",
    "pgpass",
    "pkcs12",
    "ppk",
    "pypirc",
    "tfstate",
    "tfvars",
];
/// Endings of copies that editors and people make; what a copy is of decides.
pub const COPY_ENDINGS: [&str; 9] = ["backup", "bak", "copy", "old", "orig", "save", "swo", "swp", "tmp"];

/// Whether a site publishes the file with this path below its folder, links followed. Case is ignored: some
/// file systems ignore it, too.
#[must_use]
pub fn is_published(path: &Path) -> bool {
    let folder = path.parent().is_none_or(is_published_folder);
    folder && path.file_name().is_some_and(is_published_file)
}

/// Whether a site publishes anything of the folder with this path below its own.
#[must_use]
pub fn is_published_folder(path: &Path) -> bool {
    path.components().all(|part| match part {
        Component::Normal(name) => {
            let name = name.to_string_lossy().to_lowercase();
            !is_hidden(&name) && name != PACKAGES_FOLDER
        }
        Component::CurDir => true,
        _ => false,
    })
}

fn is_hidden(name: &str) -> bool {
    name.starts_with('.') && name != WELL_KNOWN
}

fn is_published_file(name: &OsStr) -> bool {
    let name = name.to_string_lossy().to_lowercase();
    if is_hidden(&name) {
        return false;
    }
    let marks = |letter: char| letter.is_whitespace() || letter.is_control() || matches!(letter, '~' | '#' | '.');
    let mut name = name.trim_matches(marks);
    while let Some((original, ending)) = name.rsplit_once('.')
        && COPY_ENDINGS.contains(&ending)
    {
        name = original.trim_end_matches(marks);
    }
    let ending = name.rsplit_once('.').map_or("", |(_, ending)| ending);
    let begins = |beginnings: &[&str]| beginnings.iter().any(|beginning| name.starts_with(beginning));
    let is_variant = begins(&TOOL_FILE_VARIANTS) && !PAGES.contains(&ending);
    let is_key = KEY_FILES.contains(&name)
        || KEY_ENDINGS.contains(&ending)
        || (name.contains(FIREBASE_KEY) && ending == "json")
        || (begins(&KEY_PREFIXES) && ending != "pub")
        || (begins(&NAMED_KEY_PREFIXES) && ending != "pub" && !PAGES.contains(&ending));
    !is_variant && !is_key && !TOOL_FILES.contains(&name)
}

#[cfg(test)]
pub mod tests {
    use std::path::Path;

    use super::{is_published, is_published_folder};

    pub const NOT_PUBLISHED: [&str; 48] = [
        ".npmrc",
        ".env",
        ".Env.production",
        ".htpasswd",
        ".ssh/id_rsa",
        ".aws/credentials",
        "a/.git/config",
        ".SVN/entries",
        ".DS_Store",
        "id_rsa",
        "keys/ID_ED25519",
        "id_rsa.bak",
        "id_rsa.txt",
        "ssh_host_ed25519_key",
        "id_rsa_github",
        "id_ed25519-deploy",
        "ID_RSA2",
        "id_ecdsa_sk.txt",
        "id_ed25519_sk",
        "deploy_key",
        "credentials",
        "Credentials.csv",
        "my-app-firebase-adminsdk-x1y2z-0123456789.json",
        "production.env",
        "client_secret_123.json",
        "id_ed25519~",
        "#id_rsa#",
        "server.pem",
        "server.KEY",
        "server.key.old",
        "store.p12",
        "store.pfx",
        "a/store.jks",
        "site.htpasswd",
        "capsule.toml",
        "Capsule.TOML",
        "_redirects",
        "sub/_headers",
        "netlify.toml",
        "Procfile",
        "Procfile.dev",
        "Dockerfile",
        "dockerfile.prod",
        "docker-compose.override.yml",
        "node_modules/x.js",
        "../x",
        "/x",
        "terraform.tfstate.backup",
    ];

    pub const PUBLISHED: [&str; 18] = [
        "index.html",
        ".well-known/acme-challenge/x",
        "./a/b.js",
        "download.tar.gz",
        "id_rsa.pub",
        "id_rsa_github.pub",
        "id_rsa-guide.html",
        "credentials.html",
        "ssh_host_rsa_key.pub",
        "environment.html",
        "keyboard.html",
        "monkey",
        "guide/dockerfile/index.html",
        "guide/dockerfile.html",
        "procfile-guide.html",
        "README.md",
        "_next/static/app.js",
        "name..html",
    ];

    #[test]
    fn neither_hidden_files_nor_keys_nor_tool_files_are_published() {
        for path in NOT_PUBLISHED {
            assert!(!is_published(Path::new(path)), "{path}");
        }
        for path in PUBLISHED {
            assert!(is_published(Path::new(path)), "{path}");
        }
        assert!(is_published_folder(Path::new("a/dockerfile")) && is_published_folder(Path::new("")));
        assert!(!is_published_folder(Path::new("a/.git")));
    }
}
