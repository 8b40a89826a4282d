//! Hostile applications and hostile visitors, against an ingress in this process.

mod hostile_apps;
mod requests;
mod responses;
mod world;
