//! Finds, reads and writes a folder's `capsule.toml`: which organization, project and service the folder belongs to.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use capsule_buildplan::Declared;
use capsule_contracts::message::{is_label, to_label};
use toml_edit::DocumentMut;

use crate::arguments::ServiceArgs;
use crate::terminal::{self, Failure};

/// The names of a service and its environment.
#[derive(Clone, Debug)]
pub struct ServiceNames {
    /// Slug; `None` is the user's personal organization.
    pub organization: Option<String>,
    /// What names the organization, such as `--organization names`: for the error message.
    pub organization_from: &'static str,
    pub project: String,
    pub service: String,
    pub environment: String,
    /// Whether an option or `capsule.toml` names the environment. Otherwise, it is the default.
    pub is_environment_named: bool,
}

/// A folder and its `capsule.toml`.
#[derive(Debug)]
pub struct Application {
    /// Where `capsule.toml` is, or would be.
    pub folder: PathBuf,
    pub declared: Declared,
    /// Whether `capsule.toml` was found above the given folder.
    pub is_above: bool,
}

impl Application {
    /// The application of a folder: the one with the nearest `capsule.toml`, here or above.
    ///
    /// # Errors
    /// When the folder does not exist, or the file cannot be read or is malformed.
    pub fn find(folder: &Path) -> anyhow::Result<Self> {
        let start = folder.canonicalize().ok().filter(|path| path.is_dir());
        let start = start.ok_or_else(|| {
            Failure::new("no_such_folder", format!("The folder {} does not exist.", folder.display()))
                .hint("Change to the application's folder, or give its path.")
        })?;
        let home = std::env::var_os("HOME").and_then(|home| Path::new(&home).canonicalize().ok());
        match search(&start, home.as_deref()) {
            Some(above) if above != start => Ok(Self { declared: declared(&above)?, folder: above, is_above: true }),
            _ => Ok(Self { declared: declared(folder)?, folder: folder.into(), is_above: false }),
        }
    }
}

/// The nearest folder with a `capsule.toml`, from `start` upwards. The search stops at the root of the repository, at
/// the home directory, and before a folder that another user owns or can write to: that user could have put the file
/// there.
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

/// The content of the folder's `capsule.toml`, empty if there is none.
fn declared(folder: &Path) -> anyhow::Result<Declared> {
    let path = folder.join(Declared::FILE);
    match std::fs::read_to_string(&path) {
        Ok(text) => Declared::parse(&text).map_err(|error| anyhow!("{}/{error}", folder.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Declared::default()),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// The service of a command, from the options and `capsule.toml`.
///
/// # Errors
/// When neither names the project or the service.
pub fn resolve(args: &ServiceArgs) -> anyhow::Result<ServiceNames> {
    let declared = Application::find(&args.folder)?.declared;
    let missing = |what: &str| {
        Failure::new(
            "no_capsule_toml",
            format!("No {what} given, and no capsule.toml in {} or above it names one.", args.folder.display()),
        )
        .hint(format!("Change to the application's folder, or use --{what}."))
    };
    let project = args.names.project.clone().or(declared.project.clone()).ok_or_else(|| missing("project"))?;
    let service = args.names.service.clone().or(declared.service.clone()).ok_or_else(|| missing("service"))?;
    Ok(service_names(args, &declared, project, service))
}

/// What to deploy.
#[derive(Debug)]
pub struct Selection {
    pub folder: PathBuf,
    pub names: ServiceNames,
    /// Whether the user has typed a name at a prompt, and so agrees that it is created.
    pub was_prompted: bool,
}

/// What to deploy: the application of the folder, or the folder itself if the command line names another service than
/// the `capsule.toml` above. Prompts for missing names, with the folder's name as the default.
///
/// # Errors
/// When a name is missing or malformed.
pub fn select(args: &ServiceArgs, yes: bool) -> anyhow::Result<Selection> {
    let application = Application::find(&args.folder)?;
    let declared = application.declared;
    let is_another = |named: &Option<String>, declared: &Option<String>| named.is_some() && named != declared;
    let is_own = application.is_above
        && (is_another(&args.names.service, &declared.service) || is_another(&args.names.project, &declared.project));
    let folder = if is_own { args.folder.clone() } else { application.folder };
    let path = folder.canonicalize()?;
    let default = to_label(&path.file_name().unwrap_or_default().to_string_lossy(), "app");
    let mut was_prompted = false;
    let mut choose = |what: &str, named: Option<String>| match named {
        Some(name) => check_name(what, &name),
        None if yes => Ok(default.clone()),
        None if terminal::can_prompt() => {
            was_prompted = true;
            check_name(what, &terminal::prompt(what, Some(&default), "")?)
        }
        None => Err(Failure::new(
            "no_capsule_toml",
            format!("No {} given, and no capsule.toml in {} or above it names one.", what.to_lowercase(), args.folder.display()),
        )
        .hint(format!("Use --{}, or --yes to create `{default}`.", what.to_lowercase()))
        .into()),
    };
    let project = choose("Project", args.names.project.clone().or(declared.project.clone()))?;
    let service = choose("Service", args.names.service.clone().or(declared.service.clone().filter(|_| !is_own)))?;
    Ok(Selection { folder, names: service_names(args, &declared, project, service), was_prompted })
}

/// The names that `capsule init` writes into a folder. A `capsule.toml` above it is not used.
///
/// # Errors
/// When the folder does not exist, or a name is malformed.
pub fn for_init(args: &ServiceArgs) -> anyhow::Result<ServiceNames> {
    let path = args.folder.canonicalize().ok().filter(|path| path.is_dir());
    let path =
        path.ok_or_else(|| Failure::new("no_such_folder", format!("The folder {} does not exist.", args.folder.display())))?;
    let declared = declared(&args.folder)?;
    let default = to_label(&path.file_name().unwrap_or_default().to_string_lossy(), "app");
    let choose = |what: &str, named: Option<String>| match named {
        Some(name) => check_name(what, &name),
        // Without a terminal, use the default: `init` writes a file but creates nothing on the server.
        None if !terminal::can_prompt() => Ok(default.clone()),
        None => check_name(what, &terminal::prompt(what, Some(&default), "")?),
    };
    let project = choose("Project", args.names.project.clone().or(declared.project.clone()))?;
    let service = choose("Service", args.names.service.clone().or(declared.service.clone()))?;
    Ok(service_names(args, &declared, project, service))
}

fn service_names(args: &ServiceArgs, declared: &Declared, project: String, service: String) -> ServiceNames {
    let environment = args.names.environment.clone().or(declared.environment.clone());
    let organization_from = if args.names.organization.is_some() { "--organization names" } else { "capsule.toml names" };
    ServiceNames {
        organization: args.names.organization.clone().or(declared.organization.clone()),
        organization_from,
        project,
        service,
        is_environment_named: environment.is_some(),
        environment: environment.unwrap_or_else(|| "production".into()),
    }
}

fn check_name(what: &str, name: &str) -> anyhow::Result<String> {
    if is_label(name) {
        return Ok(name.into());
    }
    let what = what.to_lowercase();
    Err(Failure::new("invalid_name", format!("Invalid {what} name `{name}`: use a-z, 0-9 and -, at most 40 characters."))
        .hint(format!("Try {}.", to_label(name, "app")))
        .into())
}

/// Writes organization, project and service into the folder's `capsule.toml` where they are missing. The rest of the
/// file does not change. Returns whether the file changed.
pub fn save_names(folder: &Path, names: &ServiceNames) -> anyhow::Result<bool> {
    let path = folder.join(Declared::FILE);
    let before = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let mut document: DocumentMut = before.parse().with_context(|| format!("{} is not valid TOML", path.display()))?;
    let names = [
        ("organization", names.organization.as_deref()),
        ("project", Some(names.project.as_str())),
        ("service", Some(names.service.as_str())),
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
    std::fs::write(&path, after).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(true)
}

/// The line before the plan.
const PLAN_HEADING: &str = "# What `capsule plan` found. Uncomment to override.";
/// The same line as earlier versions wrote it.
const EARLIER_PLAN_HEADING: &str = "# What `capsule plan` found. Take the # away to say it otherwise.";

/// Adds a plan's settings to the folder's `capsule.toml` as comments, unless the file has such comments or sections.
/// Returns whether the file changed.
pub fn annotate(folder: &Path, settings: &str) -> anyhow::Result<bool> {
    let path = folder.join(Declared::FILE);
    let before = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let has_settings = before.contains(PLAN_HEADING)
        || before.contains(EARLIER_PLAN_HEADING)
        || ["build", "processes", "networking"].iter().any(|name| before.contains(&format!("[{name}")));
    if has_settings || settings.is_empty() {
        return Ok(false);
    }
    let comments: String =
        settings.lines().map(|line| if line.is_empty() { "#\n".to_owned() } else { format!("# {line}\n") }).collect();
    std::fs::write(&path, format!("{before}\n{PLAN_HEADING}\n#\n{comments}"))
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::{Application, ServiceNames, annotate, resolve, save_names, search, select};
    use crate::arguments::{NameOptions, ServiceArgs};
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    fn at(folder: &Path, names: NameOptions) -> ServiceArgs {
        ServiceArgs { folder: folder.into(), names }
    }

    fn named(project: &str, service: &str) -> NameOptions {
        let name = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        NameOptions { project: name(project), service: name(service), ..NameOptions::default() }
    }

    #[test]
    fn what_was_prompted_is_remembered_and_nothing_else_changes() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("capsule.toml");
        let own = "# mine\n[build]\nbuild = \"make\" # this way\n";
        std::fs::write(&file, own).expect("written");
        let names = ServiceNames {
            organization: Some("ada".into()),
            organization_from: "",
            project: "shop".into(),
            service: "web".into(),
            environment: "production".into(),
            is_environment_named: false,
        };
        assert!(save_names(folder.path(), &names).expect("saved"));
        assert!(!save_names(folder.path(), &names).expect("nothing to do"));
        let text = std::fs::read_to_string(&file).expect("there");
        assert!(text.contains("# mine") && text.contains("build = \"make\" # this way"), "{text}");
        let at = at(folder.path(), NameOptions::default());
        assert!(!annotate(folder.path(), "[build]\ninstall = \"x\"").expect("nothing to do"), "the section exists");
        let names = resolve(&at).expect("known");
        assert_eq!((names.project.as_str(), names.service.as_str(), names.environment.as_str()), ("shop", "web", "production"));
        assert_eq!(names.organization.as_deref(), Some("ada"), "the organization is pinned");
        // Another organization is not pinned in its place.
        let other = ServiceNames { organization: Some("eve".into()), ..names };
        assert!(!save_names(folder.path(), &other).expect("nothing to do"));
    }

    #[test]
    fn without_a_capsule_toml_the_error_names_the_missing_option() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = at(folder.path(), named("shop", ""));
        assert!(resolve(&at).expect_err("no service").to_string().contains("--service"));
    }

    #[test]
    fn the_nearest_capsule_toml_up_to_the_root_of_the_repository_is_used() {
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
        let application = Application::find(&deep).expect("found");
        assert!(application.is_above && application.declared.service.as_deref() == Some("inner"), "{application:?}");
        let names = resolve(&at(&deep, NameOptions::default())).expect("known");
        assert_eq!((names.project.as_str(), names.service.as_str()), ("shop", "inner"));
    }

    #[test]
    fn the_search_ends_at_the_home_directory_and_where_others_can_write() {
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
    fn a_folder_below_an_application_does_not_create_a_project() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = folder.path().canonicalize().expect("there");
        std::fs::create_dir(root.join("src")).expect("made");
        std::fs::write(root.join("capsule.toml"), "project = \"shop\"\nservice = \"web\"\n").expect("written");
        let of = |names, yes| select(&at(&root.join("src"), names), yes);
        for yes in [false, true] {
            let above = of(NameOptions::default(), yes).expect("known");
            assert_eq!((above.folder.as_path(), above.names.service.as_str()), (root.as_path(), "web"));
        }
        // If another service is named, the folder itself is deployed.
        let own = of(named("", "worker"), true).expect("known");
        assert_eq!((own.folder.as_path(), own.names.project.as_str()), (root.join("src").as_path(), "shop"));
        assert_eq!(own.names.service, "worker");
        std::fs::remove_file(root.join("capsule.toml")).expect("removed");
        if !crate::terminal::can_prompt() {
            let error = of(NameOptions::default(), false).expect_err("no name").to_string();
            assert!(error.contains("--project") && error.contains("--yes"), "{error}");
        }
        assert_eq!(of(NameOptions::default(), true).expect("named after the folder").names.project, "src");
    }
}
