//! Each example is deployed by the CLI and answers through the ingress with its own content.

use capsule_tests::{Server, eventually, example, fixture};
use libtest_mimic::Trial;

use crate::{test, test_with};

/// An example, the programs it needs, a path, and text that the response must contain.
const EXAMPLES: [(&str, &[&str], &str, &str); 10] = [
    ("express", &["npm"], "/greet/Ada", "{\"greeting\":\"Good day, Ada\"}"),
    ("next", &["npm"], "/", "Hello from Next"),
    ("vite-react", &["npm"], "/any/page/of/it", "Hello from Vite"),
    ("fastapi", &["python3"], "/openapi.json", "\"title\":\"Items\""),
    ("flask-worker", &["python3"], "/", "Hello from Flask"),
    ("django", &["python3"], "/products/", "{\"products\": [\"A first product\"]}"),
    ("go", &["go"], "/greet/Ada", "{\"greeting\":\"Hello, Ada\"}"),
    ("axum", &["cargo"], "/greet/Ada", "{\"greeting\":\"Hello, Ada\"}"),
    ("spring-boot", &["java", "mvn"], "/greet/Ada", "{\"greeting\":\"Hello, Ada\"}"),
    ("static", &[], "/assets/style.css", "font:"),
];

/// A fixture in a language, the programs it needs, and its response.
pub const LANGUAGES: [(&str, &[&str], &str); 7] = [
    ("python", &["python3"], "hello from Python"),
    ("php", &["php"], "hello you from PHP"),
    ("ruby", &["ruby"], "hello from Ruby"),
    ("c", &["cmake", "c++"], "hello from C"),
    ("rust", &["cargo"], "hello from Rust"),
    ("java", &["javac"], "hello from Java"),
    ("gradle", &["gradle"], "hello from Gradle"),
];

pub fn trials() -> Vec<Trial> {
    let mut trials: Vec<Trial> = EXAMPLES
        .into_iter()
        .map(|(name, programs, path, content)| {
            test_with(&format!("the {name} example is deployed and answers"), programs, move || {
                let server = Server::default();
                let folder = example(name);
                if name == "express" {
                    // Variables belong to the environment, so it must exist first.
                    server
                        .capsule(&[
                            "deploy",
                            folder.path().to_str().expect("a path"),
                            "--yes",
                            "--detach",
                            "-p",
                            name,
                            "-s",
                            name,
                        ])
                        .ok();
                    let _ =
                        server.capsule(&["env", "set", "GREETING=Good day", "-C", folder.path().to_str().expect("a path")]).ok();
                }
                server.deploy(folder.path(), name).ok();
                let host = format!("{name}-production.localhost");
                let page = server.get(&host, path);
                assert_eq!(page.status, 200, "{page:?}");
                assert!(page.body.contains(content), "{page:?}");
                let remembered = std::fs::read_to_string(folder.path().join("capsule.toml")).expect("written");
                assert!(remembered.contains(&format!("project = \"{name}\"")), "{remembered}");
            })
        })
        .collect();
    for (manager, content) in [
        ("pnpm", "two days are 172800000 ms"),
        ("yarn", "two days are 172800000 ms"),
        ("uv", "installed by uv"),
        ("poetry", "installed by poetry"),
        ("yarn-berry", "two days are 172800000 ms"),
        ("bun", "two days are 172800000 ms on Bun"),
        ("deno", "two days are 172800000 ms on Deno"),
        ("pdm", "installed by pdm"),
        ("pipenv", "installed by pipenv"),
        ("hatch", "installed by hatch"),
    ] {
        // If the host does not have the package manager, the build downloads it with the language's tools.
        let programs: &[&str] =
            if matches!(manager, "pnpm" | "yarn" | "yarn-berry" | "bun" | "deno") { &["npm"] } else { &["python3"] };
        trials.push(test_with(&format!("a project of {manager} is installed from its lock file"), programs, move || {
            let server = Server::default();
            let folder = fixture(&format!("managers/{manager}"));
            let deployed = server.deploy(folder.path(), manager).ok();
            let tool = manager.trim_end_matches("-berry");
            assert!(tool == "hatch" || deployed.err.contains(&format!("{tool} ")), "{deployed:?}");
            assert_eq!(server.get(&format!("{manager}-production.localhost"), "/").body, content);
        }));
    }
    for (language, programs, content) in LANGUAGES {
        trials.push(test_with(
            &format!("a {language} program without dependencies is deployed and serves requests"),
            programs,
            move || {
                let server = Server::default();
                let folder = fixture(&format!("languages/{language}"));
                server.deploy(folder.path(), language).ok();
                assert_eq!(server.get(&format!("{language}-production.localhost"), "/").body, content);
            },
        ));
    }
    trials.push(test_with("the worker of the Flask example runs beside its web process", &["python3"], || {
        let server = Server::default();
        let folder = example("flask-worker");
        server.deploy(folder.path(), "pair").ok();
        let at = folder.path().to_str().expect("a path");
        let beats = eventually("the worker beats", || {
            let logs = server.capsule(&["logs", at]).ok();
            logs.out.contains("worker beat 2").then_some(logs.out)
        });
        assert!(beats.lines().any(|line| line.contains(" worker.") && line.contains("worker beat 1")), "{beats}");
        let instances = server.instances(folder.path());
        let mut processes: Vec<&str> = instances.iter().filter_map(|instance| instance["process"].as_str()).collect();
        processes.sort_unstable();
        assert_eq!(processes, ["web", "worker"]);
    }));
    trials.push(test("a static site serves its own 404 page, and no file outside its folder", || {
        let server = Server::default();
        server.deploy(example("static").path(), "site").ok();
        let missing = server.get("site-production.localhost", "/nothing/here");
        assert_eq!(missing.status, 404);
        assert!(missing.body.contains("There is no such page"), "{missing:?}");
        for path in ["/../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/assets/%00", "/.git/config"] {
            let answer = server.get("site-production.localhost", path);
            assert!(matches!(answer.status, 400 | 404), "{path}: {answer:?}");
            assert!(!answer.body.contains("root:"), "{path}");
        }
    }));
    trials
}
