//! Arguments of commands for accounts and organizations.

use capsule_contracts::Role;
use clap::{Args, Subcommand};

#[derive(Debug, Args)]
pub struct Login {
    /// Your e-mail address; the password is prompted for, or read from standard input
    #[arg(long)]
    pub email: Option<String>,
    /// Create an account instead of signing in
    #[arg(long)]
    pub register: bool,
    /// Your name, for a new account
    #[arg(long, requires = "register")]
    pub name: Option<String>,
}

/// The first account of an installation needs the set-up token: in the environment variable CAPSULE_SETUP_TOKEN, or
/// in place of the registration link.
#[derive(Debug, Args)]
pub struct Register {
    /// The e-mail address that was invited; the password is prompted for, or read from standard input
    #[arg(long)]
    pub email: Option<String>,
    /// Your name
    #[arg(long)]
    pub name: Option<String>,
    /// Read the registration link from the first line of standard input, before the password
    #[arg(long)]
    pub token_stdin: bool,
}

#[derive(Debug, Subcommand)]
pub enum AccountCommand {
    /// Erase your account and every organization of which you are the only member
    Delete {
        /// Do not ask for confirmation
        #[arg(long, short)]
        yes: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum OrgCommand {
    /// List your organizations and pending invitations
    List,
    /// Create an organization
    Create {
        name: String,
        /// Organization slug [default: derived from the name]
        #[arg(long)]
        slug: Option<String>,
    },
    /// List the members of an organization, including pending ones
    Members { organization: String },
    /// Invite a person to an organization; for an address without an account, prints a registration link once
    Add {
        organization: String,
        email: String,
        /// viewer, developer, admin or owner
        #[arg(long, default_value = "developer")]
        role: Role,
    },
    /// Change a member's role
    Role { organization: String, email: String, role: Role },
    /// Remove a member or withdraw an invitation
    Remove { organization: String, email: String },
    /// Accept an invitation
    Accept { organization: String },
    /// Decline an invitation
    Decline { organization: String },
    /// Leave an organization
    Leave {
        organization: String,
        /// Do not ask for confirmation
        #[arg(long, short)]
        yes: bool,
    },
    /// Delete an organization and everything in it
    Delete {
        organization: String,
        /// Do not ask for confirmation; the password is still required
        #[arg(long, short)]
        yes: bool,
    },
}
