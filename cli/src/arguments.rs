//! The command line.

use std::path::PathBuf;

use capsule_contracts::Role;
use clap::{Args, Parser, Subcommand};

/// From a folder to a running, routed application.
#[derive(Debug, Parser)]
#[command(name = "capsule", version, propagate_version = true, max_term_width = 100)]
pub struct Arguments {
    /// The server to talk to, such as capsule.example.com: https, unless it is of this host [default: the one of this host, or the one signed in to last]
    #[arg(long, global = true, env = "CAPSULE_SERVER", value_name = "URL")]
    pub server: Option<String>,
    /// The data directory of this host's server [default: /var/lib/capsule for root, ~/.local/share/capsule for others]
    #[arg(long, global = true, env = "CAPSULE_DATA", value_name = "DIRECTORY")]
    pub data: Option<PathBuf>,
    /// Print results as JSON, and an error as a JSON object on the last line of standard error
    #[arg(long, global = true)]
    pub json: bool,
    /// Talk to a server elsewhere over http, where passwords and sessions can be read on the way; kept for its session
    #[arg(long, global = true, env = "CAPSULE_INSECURE_HTTP", value_parser = clap::builder::FalseyValueParser::new())]
    pub insecure_http: bool,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a server
    Server(Server),
    /// Look at a server's configuration
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Look at the databases' migrations, or apply them; a server applies them at its start
    Migrate {
        #[command(subcommand)]
        command: MigrateCommand,
    },
    /// Back the installation up, and restore it
    Backup {
        #[command(subcommand)]
        command: BackupCommand,
    },
    /// Sign in to a server, or make an account there
    Login(Login),
    /// Make an account, with the link that you were sent
    Register(Register),
    /// Change your password; every other session ends
    Password,
    /// Your account
    Account {
        #[command(subcommand)]
        command: AccountCommand,
    },
    /// Organizations, their members, and invitations
    Org {
        #[command(subcommand)]
        command: OrgCommand,
    },
    /// Sign out
    Logout,
    /// Tell who is signed in, and where
    Whoami,
    /// Write a capsule.toml for a folder
    Init(At),
    /// Show what a folder would be deployed as, and why
    Plan {
        #[command(flatten)]
        of: PlanOf,
        #[command(flatten)]
        image: PlanImage,
    },
    /// Build an image of a folder with Docker Engine
    Build(Build),
    /// Deploy a folder: the one with the nearest capsule.toml, here or above
    Deploy(Deploy),
    /// Show how a service is
    Status(At),
    /// Show what a service's instances print, or the log of a deployment
    Logs {
        #[command(flatten)]
        at: At,
        /// Keep showing what is printed from now on
        #[arg(long, short)]
        follow: bool,
        /// Begin with this many of the newest lines of each instance
        #[arg(long, short = 'n', value_name = "LINES")]
        tail: Option<u32>,
        /// Show the log of the latest deployment, or of the one of this number
        #[arg(long, value_name = "NUMBER", num_args = 0..=1, default_missing_value = "0")]
        deployment: Option<i64>,
    },
    /// Look at variables and secrets, and change them
    Env {
        #[command(subcommand)]
        command: EnvCommand,
    },
    /// Replace a service's instances by new ones, without losing a request
    Restart(At),
    /// Stop a service's instances
    Stop(At),
    /// Start a stopped service
    Start(At),
    /// Return to an earlier deployment, with its configuration, without building
    Rollback {
        /// The number of the deployment to return to [default: the one before the present]
        number: Option<i64>,
        #[command(flatten)]
        at: Place,
    },
    /// Cancel a deployment that is under way; what ran before keeps running
    Cancel {
        /// The number of the deployment [default: the one under way]
        number: Option<i64>,
        #[command(flatten)]
        at: Place,
    },
    /// Open a service's address in the browser
    Open(At),
    /// Delete a service's deployment in one environment (-e), or the service with all of them
    Destroy(Destroy),
    /// Show what an organization may use, and how much of it is used
    Quotas {
        /// The organization, by its slug [default: your own]
        #[arg(long, short = 'o', value_name = "SLUG")]
        organization: Option<String>,
    },
    /// Look at what needs an administrator of the installation, and settle it
    Admin {
        #[command(subcommand)]
        command: AdminCommand,
    },
    /// Check whether this host can build and run applications
    Doctor,
    /// Print completions for a shell
    Completions { shell: clap_complete::Shell },
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Server {
    /// The configuration file [default: capsule.toml in the data directory, if it is there]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Where applications and the API are reached, such as 0.0.0.0:80
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: Option<String>,
    /// Run only these parts in this process: gateway, identity, organization, project, deploy
    #[arg(long, value_name = "PART,…", value_delimiter = ',', value_enum)]
    pub only: Vec<Part>,
    /// Another setting, by its name: --set build.memory_mib=2048
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    pub set: Vec<(String, String)>,
    #[command(subcommand)]
    pub command: Option<ServerCommand>,
}

/// What a process may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Part {
    Gateway,
    Identity,
    Organization,
    Project,
    Deploy,
}

impl Part {
    /// Every part, in the order in which they start.
    pub const ALL: [Self; 5] = [Self::Identity, Self::Organization, Self::Project, Self::Deploy, Self::Gateway];

    pub fn name(self) -> &'static str {
        match self {
            Self::Gateway => "gateway",
            Self::Identity => capsule_identity::NAME,
            Self::Organization => capsule_organization::NAME,
            Self::Project => capsule_project::NAME,
            Self::Deploy => capsule_deploy::NAME,
        }
    }
}

#[derive(Debug, Subcommand)]
pub enum ServerCommand {
    /// Stop the server, every instance and the ingress; data stays
    Down,
    /// Tell whether the server can do its work
    Health {
        /// The private address of a process [default: those of this host with the data directory]
        #[arg(long, value_name = "ADDRESS:PORT")]
        at: Option<String>,
    },
    /// End the ingress; the server starts another with its settings and of its build. Connections may end
    ReplaceIngress,
}

#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Check the configuration, and show each setting with where it comes from
    Check(ConfigCheck),
}

#[derive(Debug, Subcommand)]
pub enum MigrateCommand {
    /// Apply what is missing; no server may run with this data directory
    Run(ConfigCheck),
    /// Show each migration, and whether it was applied
    Info(ConfigCheck),
    /// Take the migrations as they are now for what was applied, where the schema is as they say
    Repair(ConfigCheck),
    /// Move an embedded installation's data to the PostgreSQL server that database.url names; may be run again
    ToPostgres(ConfigCheck),
    /// Fail if one is missing, was changed after it was applied, or is not known here
    Validate(ConfigCheck),
}

#[derive(Debug, Subcommand)]
pub enum BackupCommand {
    /// Make a backup; the server may go on meanwhile
    Create {
        /// Write everything, whatever earlier backups hold
        #[arg(long)]
        full: bool,
        #[command(flatten)]
        place: BackupPlace,
    },
    /// List the backups, the oldest first
    List {
        #[command(flatten)]
        place: BackupPlace,
    },
    /// Read a backup to its last byte
    Verify {
        /// [default: the newest]
        id: Option<String>,
        #[command(flatten)]
        place: BackupPlace,
    },
    /// Restore a backup into the data directory, and into empty databases; the server must be stopped
    Restore {
        /// [default: the newest]
        id: Option<String>,
        /// Replace what is in the data directory; it is kept beside it
        #[arg(long)]
        replace: bool,
        #[command(flatten)]
        place: BackupPlace,
    },
}

#[derive(Debug, Args)]
pub struct BackupPlace {
    /// A directory, or s3://bucket/prefix [default: the setting backup.location]
    #[arg(long, value_name = "LOCATION")]
    pub at: Option<String>,
    /// The key that backups are encrypted with [default: keys/backup.key in the data directory]
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// The configuration file [default: capsule.toml in the data directory, if it is there]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// A setting as it would be given to the server
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    pub set: Vec<(String, String)>,
}

#[derive(Debug, Subcommand)]
pub enum AdminCommand {
    /// The accounts of the installation, and who administers it
    Users {
        #[command(subcommand)]
        command: UsersCommand,
    },
    /// Events that a service could not handle, however often it tried
    DeadLetters {
        #[command(subcommand)]
        command: DeadLettersCommand,
    },
    /// Processes over several services: deletions of organizations, erasures of users
    Sagas {
        #[command(subcommand)]
        command: SagasCommand,
    },
    /// What organizations may use
    Quotas {
        #[command(subcommand)]
        command: QuotasCommand,
    },
}

#[derive(Clone, Debug, Subcommand)]
pub enum QuotasCommand {
    /// Show an organization's quotas, and how much of them is used
    Show {
        /// The organization, by its slug
        organization: String,
    },
    /// Set quotas of an organization; the others stay as they are
    Set {
        /// The organization, by its slug
        organization: String,
        /// Limits such as instances=100; instances=default sets the installation's limit again
        #[arg(required = true, value_name = "NAME=LIMIT", value_parser = pair)]
        limits: Vec<(String, String)>,
    },
}

#[derive(Clone, Copy, Debug, Subcommand)]
pub enum DeadLettersCommand {
    /// List them
    List,
    /// Show one, with when and why each attempt failed
    Show { id: uuid::Uuid },
    /// Try again to handle one
    Replay { id: uuid::Uuid },
    /// Give one up
    Discard { id: uuid::Uuid },
}

#[derive(Clone, Copy, Debug, Subcommand)]
pub enum SagasCommand {
    /// List them, the newest first
    List,
    /// Show one, with what was done and undone
    Show { id: uuid::Uuid },
}

#[derive(Debug, Args)]
pub struct ConfigCheck {
    /// The configuration file [default: capsule.toml in the data directory, if it is there]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// A setting as it would be given to the server
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    pub set: Vec<(String, String)>,
}

#[derive(Debug, Args)]
pub struct Login {
    /// Your e-mail address; the password is asked for, or read from standard input
    #[arg(long)]
    pub email: Option<String>,
    /// Make an account instead of signing in to one
    #[arg(long)]
    pub register: bool,
    /// Your name, for a new account
    #[arg(long, requires = "register")]
    pub name: Option<String>,
}

/// The first account of an installation takes its set-up token: in the environment variable CAPSULE_SETUP_TOKEN, or
/// in place of the link.
#[derive(Debug, Args)]
pub struct Register {
    /// Your e-mail address, as it was invited; the password is asked for, or read from standard input
    #[arg(long)]
    pub email: Option<String>,
    /// Your name
    #[arg(long)]
    pub name: Option<String>,
    /// Read the registration link from standard input: its first line, before the password's
    #[arg(long)]
    pub token_stdin: bool,
}

#[derive(Debug, Subcommand)]
pub enum AccountCommand {
    /// Erase your account, with every organization that is yours alone
    Delete {
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum OrgCommand {
    /// List your organizations, and the invitations that wait for your answer
    List,
    /// Create an organization
    Create {
        name: String,
        /// [default: made from the name]
        #[arg(long)]
        slug: Option<String>,
    },
    /// List the members of an organization, pending ones too
    Members { organization: String },
    /// Invite a person to an organization; for an address without an account, a registration link is shown once
    Add {
        organization: String,
        email: String,
        /// viewer, developer, admin or owner
        #[arg(long, default_value = "developer")]
        role: Role,
    },
    /// Change a member's role
    Role { organization: String, email: String, role: Role },
    /// Remove a member, pending or not
    Remove { organization: String, email: String },
    /// Accept an invitation
    Accept { organization: String },
    /// Decline an invitation
    Decline { organization: String },
    /// Leave an organization
    Leave {
        organization: String,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
    },
    /// Delete an organization with everything in it
    Delete {
        organization: String,
        /// Do not ask; your password is taken in any case
        #[arg(long, short)]
        yes: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum UsersCommand {
    /// List the accounts
    List,
    /// Make a user an administrator of the installation
    Grant { email: String },
    /// End that; the last administrator stays one
    Revoke { email: String },
    /// Erase a user's account
    Delete {
        email: String,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum EnvCommand {
    /// List the variables, and the names of the secrets
    List(Place),
    /// Set variables
    Set {
        /// NAME=VALUE; for a secret NAME alone asks for the value, or reads it from standard input
        #[arg(required = true)]
        variables: Vec<String>,
        /// Keep them as secrets: encrypted, and never shown again
        #[arg(long)]
        secret: bool,
        #[command(flatten)]
        at: Place,
    },
    /// Remove variables or secrets
    Unset {
        #[arg(required = true)]
        names: Vec<String>,
        #[command(flatten)]
        at: Place,
    },
}

#[derive(Debug, Args)]
pub struct Deploy {
    #[command(flatten)]
    pub at: At,
    /// Do not wait for the deployment's end
    #[arg(long)]
    pub detach: bool,
    /// Create project and service if they are missing, with the folder's name where none is given, without asking
    #[arg(long, short)]
    pub yes: bool,
    /// Create the environment if it is missing
    #[arg(long)]
    pub create: bool,
}

#[derive(Debug, Args)]
pub struct Destroy {
    #[command(flatten)]
    pub at: At,
    /// Delete the service with its deployments in all environments
    #[arg(long, conflicts_with = "environment")]
    pub all_environments: bool,
    /// Do not ask; for the whole service, only together with --all-environments
    #[arg(long, short)]
    pub yes: bool,
}

/// A folder, and the service it is.
#[derive(Clone, Debug, Args)]
pub struct At {
    /// The application's folder
    #[arg(default_value = ".")]
    pub folder: PathBuf,
    #[command(flatten)]
    pub names: Names,
}

/// As [`At`], for commands whose positional arguments are other things.
#[derive(Clone, Debug, Args)]
pub struct Place {
    /// The application's folder
    #[arg(long, short = 'C', default_value = ".", value_name = "FOLDER")]
    pub folder: PathBuf,
    #[command(flatten)]
    pub names: Names,
}

impl From<Place> for At {
    fn from(place: Place) -> Self {
        Self { folder: place.folder, names: place.names }
    }
}

/// Which service in which environment; what is not given is in the nearest `capsule.toml`, here or above.
#[derive(Clone, Debug, Default, Args)]
pub struct Names {
    /// The organization, by its slug [default: your own]
    #[arg(long, short = 'o', value_name = "SLUG")]
    pub organization: Option<String>,
    /// The project, by its slug
    #[arg(long, short = 'p', value_name = "SLUG")]
    pub project: Option<String>,
    /// The service, by its name
    #[arg(long, short = 's', value_name = "NAME")]
    pub service: Option<String>,
    /// The environment, by its name [default: production]
    #[arg(long, short = 'e', value_name = "NAME")]
    pub environment: Option<String>,
}

fn pair(text: &str) -> Result<(String, String), String> {
    text.split_once('=').map(|(name, value)| (name.into(), value.into())).ok_or_else(|| format!("`{text}` is not NAME=VALUE"))
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        super::Arguments::command().debug_assert();
    }
}

/// Building an image.
#[derive(Debug, clap::Args)]
pub struct Build {
    /// The folder to build
    #[arg(default_value = ".")]
    pub folder: PathBuf,
    /// What the image will be called
    #[arg(long, short, value_name = "NAME:TAG")]
    pub tag: String,
    /// The Unix socket of Docker Engine
    #[arg(long, value_name = "SOCKET", default_value = "/var/run/docker.sock")]
    pub engine: PathBuf,
    /// Use this base image, as `name=image`: `node=registry.example.com/node:22@sha256:…`
    #[arg(long = "image", value_name = "NAME=IMAGE")]
    pub images: Vec<String>,
    /// Show the build this environment variable as a secret, by mount: no layer keeps it
    #[arg(long = "secret", value_name = "NAME")]
    pub secrets: Vec<String>,
    /// Give the build this environment variable as an argument
    #[arg(long = "build-arg", value_name = "NAME")]
    pub arguments: Vec<String>,
    /// Build with Docker's classic builder
    #[arg(long)]
    pub classic: bool,
    /// Do everything anew
    #[arg(long)]
    pub no_cache: bool,
    /// Instrument the program for OpenTelemetry
    #[arg(long)]
    pub opentelemetry: bool,
    /// The longest that it may take
    #[arg(long, value_name = "SECONDS", default_value = "1800")]
    pub seconds: u64,
    /// The most memory that a step may use
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(6..))]
    pub memory_mib: Option<u64>,
    /// The most that a step may use of the processors, in hundredths of a core
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(1..))]
    pub cpu_percent: Option<u32>,
    /// The largest that the image may be
    #[arg(long, value_name = "MIB")]
    pub size_mib: Option<u64>,
    /// After the build, keep no more of its cache than this
    #[arg(long, value_name = "MIB")]
    pub keep_mib: Option<u64>,
}

/// What is planned.
#[derive(Clone, Debug, clap::Args)]
pub struct PlanOf {
    /// The folder to look at, or an archive of it (tar, tar.gz, zip)
    #[arg(default_value = ".")]
    pub folder: PathBuf,
    /// Look at the folder as it is in this commit
    #[arg(long, value_name = "REVISION")]
    pub commit: Option<String>,
    /// List the members of a monorepo that a change of this file touches; may be given several times
    #[arg(long, value_name = "FILE", conflicts_with = "dockerfile")]
    pub changed: Vec<String>,
    /// List the members that are touched by what has changed since this commit
    #[arg(long, value_name = "REVISION", conflicts_with = "dockerfile")]
    pub since: Option<String>,
}

/// What an image is made of.
#[derive(Debug, Default, clap::Args)]
pub struct PlanImage {
    /// Print the Dockerfile that the plan makes
    #[arg(long)]
    pub dockerfile: bool,
    /// Use this base image, as `name=image`: `node=registry.example.com/node:22@sha256:…`
    #[arg(long = "image", value_name = "NAME=IMAGE", requires = "dockerfile")]
    pub images: Vec<String>,
    /// Give the build this secret, by mount: no layer keeps it
    #[arg(long = "secret", value_name = "NAME", requires = "dockerfile")]
    pub secrets: Vec<String>,
    /// Give the build this argument
    #[arg(long = "build-arg", value_name = "NAME", requires = "dockerfile")]
    pub arguments: Vec<String>,
    /// Write it for Docker's classic builder, without caches that outlive a build
    #[arg(long, requires = "dockerfile")]
    pub classic: bool,
    /// Instrument the program for OpenTelemetry
    #[arg(long, requires = "dockerfile")]
    pub opentelemetry: bool,
}
