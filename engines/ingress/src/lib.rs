//! The one public door: a reverse proxy for the users' applications, and for the gateway.
//!
//! It is a process of its own that the server starts and finds again. Its routing table comes over
//! a Unix socket, is swapped atomically, and is kept on disk, so that applications are served while
//! the control plane is dead, and after a restart of the machine before it is alive.

mod balance;
mod body;
mod client;
mod control;
mod cookies;
mod forwarded;
mod identity;
mod pages;
mod pool;
mod proxy;
mod request;
mod serve;
mod sites;
mod stream;
mod table;
mod upstream;
mod visitor;

pub use client::{Client, Hello};
pub use identity::build;
pub use serve::{Options, run};
pub use table::{Route, Site, State, Table, Target};
