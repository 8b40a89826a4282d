//! Arguments of commands for operators: the server, its configuration, databases and backups, and `capsule admin`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::pair;

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Server {
    /// Configuration file [default: capsule.toml in the data directory, if it exists]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Address that the ingress listens on for applications and the API, such as 0.0.0.0:80
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: Option<String>,
    /// Run only these parts in this process: gateway, identity, organization, project, deploy
    #[arg(long, value_name = "PART,…", value_delimiter = ',', value_enum)]
    pub only: Vec<Part>,
    /// Override any setting, such as --set build.memory_mib=2048
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    pub set: Vec<(String, String)>,
    #[command(subcommand)]
    pub command: Option<ServerCommand>,
}

/// A part of the server that a process can run.
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
    /// Stop the server, the ingress and all instances; data is kept
    Down,
    /// Check the server's health
    Health {
        /// Private address of a process [default: all processes on this host with this data directory]
        #[arg(long, value_name = "ADDRESS:PORT")]
        at: Option<String>,
    },
    /// Replace the ingress with one of the server's settings and version; long connections end
    ReplaceIngress,
}

#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Validate the configuration and show each setting with its source
    Check(ConfigOptions),
}

#[derive(Debug, Subcommand)]
pub enum MigrateCommand {
    /// Apply pending migrations; no server may be running with this data directory
    Run(ConfigOptions),
    /// List migrations and their state
    Info(ConfigOptions),
    /// Record the current migrations as the applied ones, where the schema matches them
    Repair(ConfigOptions),
    /// Copy an embedded installation's data to the PostgreSQL server in database.url; can be repeated
    ToPostgres(ConfigOptions),
    /// Fail if a migration is pending, was changed after it was applied, or is unknown
    Validate(ConfigOptions),
}

#[derive(Debug, Subcommand)]
pub enum BackupCommand {
    /// Create a backup; the server can keep running
    Create {
        /// Create a full backup instead of an incremental one
        #[arg(long)]
        full: bool,
        #[command(flatten)]
        options: BackupOptions,
    },
    /// List backups, oldest first
    List {
        #[command(flatten)]
        options: BackupOptions,
    },
    /// Read a whole backup and verify it
    Verify {
        /// Backup ID [default: the newest]
        id: Option<String>,
        #[command(flatten)]
        options: BackupOptions,
    },
    /// Restore a backup into the data directory and empty databases; the server must be stopped
    Restore {
        /// Backup ID [default: the newest]
        id: Option<String>,
        /// Replace the data directory; the old one is kept beside it
        #[arg(long)]
        replace: bool,
        #[command(flatten)]
        options: BackupOptions,
    },
}

#[derive(Debug, Args)]
pub struct BackupOptions {
    /// Backup location: a directory or s3://bucket/prefix [default: the setting backup.location]
    #[arg(long, value_name = "LOCATION")]
    pub at: Option<String>,
    /// Encryption key of the backups [default: keys/backup.key in the data directory]
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// Configuration file [default: capsule.toml in the data directory, if it exists]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Override a setting of the server
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    pub set: Vec<(String, String)>,
}

#[derive(Debug, Subcommand)]
pub enum AdminCommand {
    /// Manage accounts and administrators
    Users {
        #[command(subcommand)]
        command: UsersCommand,
    },
    /// Manage events that a service failed to handle after all retries
    DeadLetters {
        #[command(subcommand)]
        command: DeadLettersCommand,
    },
    /// Show operations over several services: deletions of organizations, erasures of users
    Sagas {
        #[command(subcommand)]
        command: SagasCommand,
    },
    /// Manage organizations' quotas
    Quotas {
        #[command(subcommand)]
        command: QuotasCommand,
    },
}

#[derive(Clone, Debug, Subcommand)]
pub enum QuotasCommand {
    /// Show an organization's quotas and usage
    Show {
        /// Organization slug or ID
        organization: String,
    },
    /// Set quotas of an organization; the other quotas keep their values
    Set {
        /// Organization slug or ID
        organization: String,
        /// Limits such as instances=100; instances=default restores the installation's limit
        #[arg(required = true, value_name = "NAME=LIMIT", value_parser = pair)]
        limits: Vec<(String, String)>,
    },
}

#[derive(Clone, Copy, Debug, Subcommand)]
pub enum DeadLettersCommand {
    /// List dead letters
    List,
    /// Show a dead letter with its failed attempts
    Show { id: uuid::Uuid },
    /// Retry a dead letter
    Replay { id: uuid::Uuid },
    /// Discard a dead letter
    Discard { id: uuid::Uuid },
}

#[derive(Clone, Copy, Debug, Subcommand)]
pub enum SagasCommand {
    /// List sagas, newest first
    List,
    /// Show a saga with the steps done and undone
    Show { id: uuid::Uuid },
}

#[derive(Debug, Args)]
pub struct ConfigOptions {
    /// Configuration file [default: capsule.toml in the data directory, if it exists]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Override a setting of the server
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    pub set: Vec<(String, String)>,
}

#[derive(Debug, Subcommand)]
pub enum UsersCommand {
    /// List accounts
    List,
    /// Make a user an administrator of the installation
    Grant { email: String },
    /// Make an administrator an ordinary user; the last administrator cannot be revoked
    Revoke { email: String },
    /// Erase a user's account
    Delete {
        email: String,
        /// Do not ask for confirmation
        #[arg(long, short)]
        yes: bool,
    },
}
