//! Attacks from outside, from inside an application, and with hostile repositories, by area.
//! Each test fails on a server without the defence under test.

mod access;
mod data;
mod ingress;
mod limits;
mod plans;
pub mod quotas;
mod sandbox;
mod terminal;

use libtest_mimic::Trial;

pub fn trials() -> Vec<Trial> {
    let areas = [
        access::trials(),
        data::trials(),
        ingress::trials(),
        limits::trials(),
        plans::trials(),
        quotas::trials(),
        sandbox::trials(),
        terminal::trials(),
    ];
    areas.into_iter().flatten().collect()
}
