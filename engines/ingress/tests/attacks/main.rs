//! Attacks by applications and by visitors on an ingress that runs in this process.

mod hostile_apps;
mod requests;
mod responses;
mod world;
