//! The ingress: a reverse proxy on the public port, for applications and for the gateway.
//!
//! It is a process of its own, which the server starts, and finds again after a restart. It receives its routing table
//! over a Unix socket, replaces it atomically, and saves it to disk. So it serves applications while the control plane
//! is down, and after a restart of the machine before the control plane is up.

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
pub use identity::build_id;
pub use serve::{Options, run};
pub use table::{Endpoint, Route, Site, State, Table};
