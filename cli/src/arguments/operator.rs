//! Arguments of commands for operators: the server, its configuration, databases and backups, and `capsule admin`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::pair;

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
