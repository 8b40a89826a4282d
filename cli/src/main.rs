fn main() {
    match std::env::args().nth(1).as_deref() {
        Some("shim") => std::process::exit(capsule_runtime::shim::run()),
        Some("sandbox") => std::process::exit(capsule_runtime::sandbox::run()),
        _ => {}
    }
}
