//! Failpoints: places where a test ends or pauses the server. Only builds with the feature `failpoints` have them, and
//! an optimised build with that feature must also have debug assertions, which no released binary has.

#[cfg(all(feature = "failpoints", not(debug_assertions)))]
compile_error!("the feature `failpoints` is for test builds: build with the profile `dev` or `crash-test`");

use capsule_contracts::deploy::Phase;

/// Does what the environment variable `CAPSULE_FAILPOINT` requests for this point. `<phase>:before` or `<phase>:after` ends
/// the process at once, without cleanup. `<phase>:before=<file>` creates `<file>.reached` and waits until `<file>` exists.
#[cfg(feature = "failpoints")]
pub async fn reach(phase: Phase, moment: &str) {
    let Ok(requested) = std::env::var("CAPSULE_FAILPOINT") else { return };
    let (point, file) = requested.split_once('=').map_or((requested.as_str(), None), |(point, file)| (point, Some(file)));
    if point.split_once(':') != Some((phase.name(), moment)) {
        return;
    }
    let Some(file) = file else { std::process::abort() };
    let _ = std::fs::write(format!("{file}.reached"), "");
    while !std::path::Path::new(file).exists() {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

/// Does nothing: this build has no failpoints.
#[cfg(not(feature = "failpoints"))]
pub async fn reach(_: Phase, _: &str) {}
