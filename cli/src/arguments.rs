//! The command line.

mod account;
mod image;
mod operator;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

pub use account::{AccountCommand, Login, OrgCommand, Register};
pub use image::{Build, PlanImage, PlanOf};
pub use operator::{
    AdminCommand, BackupCommand, BackupPlace, ConfigCommand, DeadLettersCommand, MigrateCommand, Part, QuotasCommand,
    SagasCommand, Server, ServerCommand, UsersCommand,
};

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
