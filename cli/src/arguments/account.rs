//! Arguments of commands for accounts and organizations.

use capsule_contracts::Role;
use clap::{Args, Subcommand};

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
