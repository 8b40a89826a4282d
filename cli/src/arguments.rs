//! The command line.

mod account;
mod image;
mod operator;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

pub use account::{AccountCommand, Login, OrgCommand, Register};
pub use image::{Build, DockerfileOptions, PlanSource};
pub use operator::{
    AdminCommand, BackupCommand, BackupOptions, ConfigCommand, DeadLettersCommand, MigrateCommand, Part, QuotasCommand,
    SagasCommand, Server, ServerCommand, UsersCommand,
};

/// Deploy and run applications on your own server.
#[derive(Debug, Parser)]
#[command(name = "capsule", version, propagate_version = true, max_term_width = 100)]
pub struct Arguments {
    /// Server URL, such as capsule.example.com; https, except for loopback addresses [default: this host's server, or the one you last signed in to]
    #[arg(long, global = true, env = "CAPSULE_SERVER", value_name = "URL")]
    pub server: Option<String>,
    /// Data directory of this host's server [default: /var/lib/capsule for root, ~/.local/share/capsule for others]
    #[arg(long, global = true, env = "CAPSULE_DATA", value_name = "DIRECTORY")]
    pub data: Option<PathBuf>,
    /// Print results as JSON, and errors as one JSON object on the last line of standard error
    #[arg(long, global = true)]
    pub json: bool,
    /// Allow http to a remote server, although passwords and sessions can be read in transit; kept with the session
    #[arg(long, global = true, env = "CAPSULE_INSECURE_HTTP", value_parser = clap::builder::FalseyValueParser::new())]
    pub insecure_http: bool,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a server
    Server(Server),
    /// Check a server's configuration
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Show or apply database migrations; a server applies them when it starts
    Migrate {
        #[command(subcommand)]
        command: MigrateCommand,
    },
    /// Back up and restore the installation
    Backup {
        #[command(subcommand)]
        command: BackupCommand,
    },
    /// Sign in to a server, or create an account there
    Login(Login),
    /// Create an account with a registration link
    Register(Register),
    /// Change your password and end your other sessions
    Password,
    /// Manage your account
    Account {
        #[command(subcommand)]
        command: AccountCommand,
    },
    /// Manage organizations, members and invitations
    Org {
        #[command(subcommand)]
        command: OrgCommand,
    },
    /// Sign out
    Logout,
    /// Show the signed-in user and the server
    Whoami,
    /// Write a capsule.toml for a folder
    Init(ServiceArgs),
    /// Show how a folder would be built and run, and why
    Plan {
        #[command(flatten)]
        source: PlanSource,
        #[command(flatten)]
        options: DockerfileOptions,
    },
    /// Build a container image from a folder with Docker Engine
    Build(Build),
    /// Deploy a folder: the nearest one with a capsule.toml, here or above
    Deploy(Deploy),
    /// Show a service's status
    Status(ServiceArgs),
    /// Show the logs of a service's instances, or of a deployment
    Logs {
        #[command(flatten)]
        at: ServiceArgs,
        /// Keep printing new lines
        #[arg(long, short)]
        follow: bool,
        /// Start with this many of the newest lines of each instance
        #[arg(long, short = 'n', value_name = "LINES")]
        tail: Option<u32>,
        /// Show the log of the deployment with this number, or of the latest
        #[arg(long, value_name = "NUMBER", num_args = 0..=1, default_missing_value = "0")]
        deployment: Option<i64>,
    },
    /// Manage variables and secrets
    Env {
        #[command(subcommand)]
        command: EnvCommand,
    },
    /// Replace a service's instances with new ones, without losing a request
    Restart(ServiceArgs),
    /// Stop a service's instances
    Stop(ServiceArgs),
    /// Start a stopped service
    Start(ServiceArgs),
    /// Roll back to an earlier deployment and its configuration, without a build
    Rollback {
        /// Number of the deployment to roll back to [default: the latest one of another release]
        number: Option<i64>,
        #[command(flatten)]
        at: ServiceOptions,
    },
    /// Cancel a deployment in progress; the previous version stays live
    Cancel {
        /// Number of the deployment [default: the one in progress]
        number: Option<i64>,
        #[command(flatten)]
        at: ServiceOptions,
    },
    /// Open a service's URL in the browser
    Open(ServiceArgs),
    /// Delete a service and its instances, in one environment (-e) or in all
    Destroy(Destroy),
    /// Show an organization's quotas and usage
    Quotas {
        /// Organization slug [default: your personal organization]
        #[arg(long, short = 'o', value_name = "SLUG")]
        organization: Option<String>,
    },
    /// Administer the installation: users, quotas, dead letters and sagas
    Admin {
        #[command(subcommand)]
        command: AdminCommand,
    },
    /// Check whether this host can build and run applications
    Doctor,
    /// Print a completion script for a shell
    Completions { shell: clap_complete::Shell },
    /// Write a manual page for each command into a directory
    ManPages { directory: PathBuf },
}

#[derive(Debug, Subcommand)]
pub enum EnvCommand {
    /// List variables and the names of secrets
    List(ServiceOptions),
    /// Set variables or secrets
    Set {
        /// NAME=VALUE; with --secret, NAME alone prompts for the value or reads it from standard input
        #[arg(required = true)]
        variables: Vec<String>,
        /// Store as secrets: encrypted, and never shown again
        #[arg(long)]
        secret: bool,
        #[command(flatten)]
        at: ServiceOptions,
    },
    /// Remove variables or secrets
    Unset {
        #[arg(required = true)]
        names: Vec<String>,
        #[command(flatten)]
        at: ServiceOptions,
    },
}

#[derive(Debug, Args)]
pub struct Deploy {
    #[command(flatten)]
    pub at: ServiceArgs,
    /// Do not wait for the deployment to finish
    #[arg(long)]
    pub detach: bool,
    /// Create a missing project and service without asking; their default name is the folder's
    #[arg(long, short)]
    pub yes: bool,
    /// Create the environment if it does not exist
    #[arg(long)]
    pub create: bool,
}

#[derive(Debug, Args)]
pub struct Destroy {
    #[command(flatten)]
    pub at: ServiceArgs,
    /// Delete the service in all environments
    #[arg(long, conflicts_with = "environment")]
    pub all_environments: bool,
    /// Do not ask for confirmation; to delete the service in all environments, also give --all-environments
    #[arg(long, short)]
    pub yes: bool,
}

/// A folder, and the names of its service.
#[derive(Clone, Debug, Args)]
pub struct ServiceArgs {
    /// The application's folder
    #[arg(default_value = ".")]
    pub folder: PathBuf,
    #[command(flatten)]
    pub names: NameOptions,
}

/// The same as [`ServiceArgs`], for commands whose positional arguments are not the folder.
#[derive(Clone, Debug, Args)]
pub struct ServiceOptions {
    /// The application's folder
    #[arg(long, short = 'C', default_value = ".", value_name = "FOLDER")]
    pub folder: PathBuf,
    #[command(flatten)]
    pub names: NameOptions,
}

impl From<ServiceOptions> for ServiceArgs {
    fn from(place: ServiceOptions) -> Self {
        Self { folder: place.folder, names: place.names }
    }
}

/// The service and its environment. The nearest `capsule.toml`, here or above, has what is not given.
#[derive(Clone, Debug, Default, Args)]
pub struct NameOptions {
    /// Organization slug [default: your personal organization]
    #[arg(long, short = 'o', value_name = "SLUG")]
    pub organization: Option<String>,
    /// Project slug
    #[arg(long, short = 'p', value_name = "SLUG")]
    pub project: Option<String>,
    /// Service name
    #[arg(long, short = 's', value_name = "NAME")]
    pub service: Option<String>,
    /// Environment name [default: production]
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
