//! What a folder says of where it is deployed to, in `capsule.toml`, here or above, and that it is kept there.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use capsule_buildplan::Declared;
use capsule_contracts::message::{is_label, to_label};
use toml_edit::DocumentMut;

use crate::arguments::At;
use crate::terminal::{self, Failure};

/// A service in an environment, by names.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// By its slug; one's own where nothing names another.
    pub organization: Option<String>,
    /// What names the organization, for the message where it is wrong.
    pub organization_from: &'static str,
    pub project: String,
    pub service: String,
    pub environment: String,
    /// Whether the environment was named, and is not just the default.
    pub is_environment_named: bool,
}

/// A folder with the `capsule.toml` that is about it.
#[derive(Debug)]
pub struct Application {
    /// Where `capsule.toml` is, or would be.
    pub folder: PathBuf,
    pub declared: Declared,
    /// Whether `capsule.toml` was found above the folder that was asked for.
    pub is_above: bool,
}

impl Application {
    /// The application that a folder belongs to: the one of the nearest `capsule.toml`, here or above.
    ///
    /// # Errors
    /// When there is no such folder, or the file cannot be read or is malformed.
    pub fn of(folder: &Path) -> anyhow::Result<Self> {
        let start = folder.canonicalize().ok().filter(|path| path.is_dir());
        let start = start.ok_or_else(|| {
            Failure::new("no_such_folder", format!("There is no folder {}.", folder.display()))
                .hint("Go to the application's folder, or name it.")
        })?;
        let home = std::env::var_os("HOME").and_then(|home| Path::new(&home).canonicalize().ok());
        match search(&start, home.as_deref()) {
            Some(above) if above != start => Ok(Self { declared: declared(&above)?, folder: above, is_above: true }),
            _ => Ok(Self { declared: declared(folder)?, folder: folder.into(), is_above: false }),
        }
    }
}

/// The nearest folder with a `capsule.toml`, from `start` upwards: not beyond the root of its repository, the home
/// directory, or a folder that others own or may write to, who could put the file there.
fn search(start: &Path, home: Option<&Path>) -> Option<PathBuf> {
    let owner = std::fs::metadata(start).ok()?.uid();
    let mut at = start;
    loop {
        if let Ok(file) = std::fs::symlink_metadata(at.join(Declared::FILE))
            && !file.is_dir()
            && (at == start || [owner, 0, rustix::process::geteuid().as_raw()].contains(&file.uid()))
        {
            return Some(at.into());
        }
        let is_root = [".git", ".hg"].iter().any(|name| at.join(name).symlink_metadata().is_ok());
        if is_root || home == Some(at) {
            return None;
        }
        at = at.parent()?;
        let folder = std::fs::metadata(at).ok()?;
        if folder.uid() != owner || folder.mode() & 0o002 != 0 {
            return None;
        }
    }
}

/// What the folder's `capsule.toml` says; nothing, if there is none.
fn declared(folder: &Path) -> anyhow::Result<Declared> {
    let path = folder.join(Declared::FILE);
    match std::fs::read_to_string(&path) {
        Ok(text) => Declared::parse(&text).map_err(|error| anyhow!("{}/{error}", folder.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Declared::default()),
        Err(error) => Err(error).with_context(|| format!("{} cannot be read", path.display())),
    }
}

/// The service that a command is about; everything about it must be known.
///
/// # Errors
/// When project or service are named nowhere.
pub fn known(at: &At) -> anyhow::Result<Wanted> {
    let declared = Application::of(&at.folder)?.declared;
    let missing = |what: &str| {
        Failure::new(
            "no_capsule_toml",
            format!("Which {what}? No capsule.toml in {} or above it names one.", at.folder.display()),
        )
        .hint(format!("Go to the application's folder, or give --{what}."))
    };
    let project = at.names.project.clone().or(declared.project.clone()).ok_or_else(|| missing("project"))?;
    let service = at.names.service.clone().or(declared.service.clone()).ok_or_else(|| missing("service"))?;
    Ok(wanted(at, &declared, project, service))
}

/// What is to be deployed, and whether a person has just named what may be missing.
#[derive(Debug)]
pub struct Chosen {
    pub folder: PathBuf,
    pub wanted: Wanted,
    pub was_asked: bool,
}

/// What is to be deployed: the application of the folder, or, where the command line names another service than the
/// `capsule.toml` above, the folder itself. Names that are missing are asked for, with the folder's name as the proposal.
///
/// # Errors
/// When a name is missing or malformed.
pub fn chosen(at: &At, yes: bool) -> anyhow::Result<Chosen> {
    let application = Application::of(&at.folder)?;
    let declared = application.declared;
    let is_another = |named: &Option<String>, declared: &Option<String>| named.is_some() && named != declared;
    let is_own = application.is_above
        && (is_another(&at.names.service, &declared.service) || is_another(&at.names.project, &declared.project));
    let folder = if is_own { at.folder.clone() } else { application.folder };
    let path = folder.canonicalize()?;
    let proposal = to_label(&path.file_name().unwrap_or_default().to_string_lossy(), "app");
    let mut was_asked = false;
    let mut choose = |what: &str, named: Option<String>| match named {
        Some(name) => label(what, &name),
        None if yes => Ok(proposal.clone()),
        None if terminal::can_ask() => {
            was_asked = true;
            label(what, &terminal::ask(what, Some(&proposal), "")?)
        }
        None => Err(Failure::new(
            "no_capsule_toml",
            format!("Which {}? No capsule.toml in {} or above it names one.", what.to_lowercase(), at.folder.display()),
        )
        .hint(format!("Give --{}, or --yes to create `{proposal}`.", what.to_lowercase()))
        .into()),
    };
    let project = choose("Project", at.names.project.clone().or(declared.project.clone()))?;
    let service = choose("Service", at.names.service.clone().or(declared.service.clone().filter(|_| !is_own)))?;
    Ok(Chosen { folder, wanted: wanted(at, &declared, project, service), was_asked })
}

/// What `capsule init` writes into a folder: of this folder only, whatever is above it.
///
/// # Errors
/// When a name is malformed, or cannot be asked for.
pub fn for_init(at: &At) -> anyhow::Result<Wanted> {
    let path = at.folder.canonicalize().ok().filter(|path| path.is_dir());
    let path = path.ok_or_else(|| Failure::new("no_such_folder", format!("There is no folder {}.", at.folder.display())))?;
    let declared = declared(&at.folder)?;
    let proposal = to_label(&path.file_name().unwrap_or_default().to_string_lossy(), "app");
    let choose = |what: &str, named: Option<String>| match named {
        Some(name) => label(what, &name),
        // A file is written, and nothing created: the proposal does where nobody can be asked.
        None if !terminal::can_ask() => Ok(proposal.clone()),
        None => label(what, &terminal::ask(what, Some(&proposal), "")?),
    };
    let project = choose("Project", at.names.project.clone().or(declared.project.clone()))?;
    let service = choose("Service", at.names.service.clone().or(declared.service.clone()))?;
    Ok(wanted(at, &declared, project, service))
}

fn wanted(at: &At, declared: &Declared, project: String, service: String) -> Wanted {
    let environment = at.names.environment.clone().or(declared.environment.clone());
    let organization_from = if at.names.organization.is_some() { "--organization names" } else { "capsule.toml names" };
    Wanted {
        organization: at.names.organization.clone().or(declared.organization.clone()),
        organization_from,
        project,
        service,
        is_environment_named: environment.is_some(),
        environment: environment.unwrap_or_else(|| "production".into()),
    }
}

fn label(what: &str, name: &str) -> anyhow::Result<String> {
    if is_label(name) {
        return Ok(name.into());
    }
    let what = what.to_lowercase();
    Err(Failure::new("invalid_name", format!("Invalid {what} name `{name}`: use a-z, 0-9 and -, at most 40."))
        .hint(format!("Try {}.", to_label(name, "app")))
        .into())
}

/// Writes organization, project and service into the folder's `capsule.toml`, leaving the rest of it as it is.
/// Returns whether anything had to be written.
pub fn remember(folder: &Path, wanted: &Wanted) -> anyhow::Result<bool> {
    let path = folder.join(Declared::FILE);
    let before = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error).with_context(|| format!("{} cannot be read", path.display())),
    };
    let mut document: DocumentMut = before.parse().with_context(|| format!("{} is malformed", path.display()))?;
    let names = [
        ("organization", wanted.organization.as_deref()),
        ("project", Some(wanted.project.as_str())),
        ("service", Some(wanted.service.as_str())),
    ];
    for (name, value) in names {
        if let Some(value) = value
            && document.get(name).is_none()
        {
            document[name] = toml_edit::value(value);
        }
    }
    let after = document.to_string();
    if after == before {
        return Ok(false);
    }
    std::fs::write(&path, after).with_context(|| format!("{} cannot be written", path.display()))?;
    Ok(true)
}

/// The line before what was found.
const FOUND: &str = "# What `capsule plan` found. Uncomment to override.";
/// What that line was before.
const FOUND_BEFORE: &str = "# What `capsule plan` found. Take the # away to say it otherwise.";

/// Adds what a plan found to the folder's `capsule.toml`, as comments; once, and not where something of it is
/// said already. Returns whether anything had to be written.
pub fn annotate(folder: &Path, found: &str) -> anyhow::Result<bool> {
    let path = folder.join(Declared::FILE);
    let before = std::fs::read_to_string(&path).with_context(|| format!("{} cannot be read", path.display()))?;
    let is_said = before.contains(FOUND)
        || before.contains(FOUND_BEFORE)
        || ["build", "processes", "networking"].iter().any(|name| before.contains(&format!("[{name}")));
    if is_said || found.is_empty() {
        return Ok(false);
    }
    let comments: String =
        found.lines().map(|line| if line.is_empty() { "#\n".to_owned() } else { format!("# {line}\n") }).collect();
    std::fs::write(&path, format!("{before}\n{FOUND}\n#\n{comments}"))
        .with_context(|| format!("{} cannot be written", path.display()))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::{Application, Wanted, annotate, chosen, known, remember, search};
    use crate::arguments::{At, Names};
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    fn at(folder: &Path, names: Names) -> At {
        At { folder: folder.into(), names }
    }

    fn named(project: &str, service: &str) -> Names {
        let name = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        Names { project: name(project), service: name(service), ..Names::default() }
    }

    #[test]
    fn what_was_asked_is_remembered_and_nothing_else_changes() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("capsule.toml");
        let own = "# mine\n[build]\nbuild = \"make\" # this way\n";
        std::fs::write(&file, own).expect("written");
        let wanted = Wanted {
            organization: Some("ada".into()),
            organization_from: "",
            project: "shop".into(),
            service: "web".into(),
            environment: "production".into(),
            is_environment_named: false,
        };
        assert!(remember(folder.path(), &wanted).expect("remembered"));
        assert!(!remember(folder.path(), &wanted).expect("nothing to do"));
        let text = std::fs::read_to_string(&file).expect("there");
        assert!(text.contains("# mine") && text.contains("build = \"make\" # this way"), "{text}");
        let at = at(folder.path(), Names::default());
        assert!(!annotate(folder.path(), "[build]\ninstall = \"x\"").expect("nothing to do"), "it is said already");
        let known = known(&at).expect("known");
        assert_eq!((known.project.as_str(), known.service.as_str(), known.environment.as_str()), ("shop", "web", "production"));
        assert_eq!(known.organization.as_deref(), Some("ada"), "the organization is pinned");
        // Another organization is not pinned in its place.
        let other = Wanted { organization: Some("eve".into()), ..wanted };
        assert!(!remember(folder.path(), &other).expect("nothing to do"));
    }

    #[test]
    fn without_a_capsule_toml_the_missing_name_is_told() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = at(folder.path(), named("shop", ""));
        assert!(known(&at).expect_err("no service").to_string().contains("--service"));
    }

    #[test]
    fn the_nearest_capsule_toml_counts_up_to_the_root_of_the_repository() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = folder.path().canonicalize().expect("there");
        let deep = root.join("repository/apps/web/src");
        std::fs::create_dir_all(&deep).expect("made");
        std::fs::write(root.join("capsule.toml"), "project = \"outside\"\nservice = \"x\"\n").expect("written");
        assert_eq!(search(&deep, None), Some(root.clone()));
        std::fs::create_dir(root.join("repository/.git")).expect("made");
        assert_eq!(search(&deep, None), None, "not beyond the repository");
        std::fs::write(root.join("repository/capsule.toml"), "project = \"shop\"\nservice = \"web\"\n").expect("written");
        assert_eq!(search(&deep, None), Some(root.join("repository")), "its root counts");
        std::fs::write(root.join("repository/apps/web/capsule.toml"), "project = \"shop\"\nservice = \"inner\"\n")
            .expect("written");
        assert_eq!(search(&deep, None), Some(root.join("repository/apps/web")));
        let application = Application::of(&deep).expect("found");
        assert!(application.is_above && application.declared.service.as_deref() == Some("inner"), "{application:?}");
        let known = known(&at(&deep, Names::default())).expect("known");
        assert_eq!((known.project.as_str(), known.service.as_str()), ("shop", "inner"));
    }

    #[test]
    fn the_search_ends_at_the_home_directory_and_where_others_may_write() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = folder.path().canonicalize().expect("there");
        let (home, deep) = (root.join("home"), root.join("home/work/src"));
        std::fs::create_dir_all(&deep).expect("made");
        std::fs::write(root.join("capsule.toml"), "").expect("written");
        assert_eq!(search(&deep, Some(&home)), None, "not beyond the home directory");
        assert_eq!(search(&deep, None), Some(root.clone()));
        let writable = |mode| std::fs::set_permissions(&root, PermissionsExt::from_mode(mode)).expect("changed");
        writable(0o1777);
        assert_eq!(search(&deep, None), None, "anyone could have put it there");
        writable(0o755);
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&root, Some(65534), None).expect("it is root");
            assert_eq!(search(&deep, None), None, "a folder of another owner");
            std::os::unix::fs::chown(&root, Some(0), None).expect("it is root");
            std::os::unix::fs::chown(root.join("capsule.toml"), Some(65534), None).expect("it is root");
            assert_eq!(search(&deep, None), None, "a file of another owner");
        }
    }

    #[test]
    fn a_folder_below_an_application_makes_no_project() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = folder.path().canonicalize().expect("there");
        std::fs::create_dir(root.join("src")).expect("made");
        std::fs::write(root.join("capsule.toml"), "project = \"shop\"\nservice = \"web\"\n").expect("written");
        let of = |names, yes| chosen(&at(&root.join("src"), names), yes);
        for yes in [false, true] {
            let above = of(Names::default(), yes).expect("known");
            assert_eq!((above.folder.as_path(), above.wanted.service.as_str()), (root.as_path(), "web"));
        }
        // Another service that is named is the folder's own.
        let own = of(named("", "worker"), true).expect("known");
        assert_eq!((own.folder.as_path(), own.wanted.project.as_str()), (root.join("src").as_path(), "shop"));
        assert_eq!(own.wanted.service, "worker");
        std::fs::remove_file(root.join("capsule.toml")).expect("removed");
        if !crate::terminal::can_ask() {
            let told = of(Names::default(), false).expect_err("nobody says so").to_string();
            assert!(told.contains("--project") && told.contains("--yes"), "{told}");
        }
        assert_eq!(of(Names::default(), true).expect("as told").wanted.project, "src");
    }
}
