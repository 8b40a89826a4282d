//! Build and start settings in the files of other platforms.

use serde_json::Value;

use crate::bounds::{is_process_name, truncate_to};
use crate::plan::{Draft, Kind, Source};
use crate::tree::{Repo, line_of};

/// A file of another platform, as JSON whatever its format.
struct Other<'a> {
    file: &'static str,
    text: std::rc::Rc<str>,
    value: Value,
    draft: &'a mut Draft,
}

impl Other<'_> {
    fn get(&self, pointer: &str) -> Option<Value> {
        self.value.pointer(pointer).filter(|value| !value.is_null()).cloned()
    }

    /// One command, or a list; `...` stands for the detected command.
    fn command(&self, pointer: &str, anyway: Option<&str>) -> Option<String> {
        let value = self.get(pointer)?;
        let commands = match &value {
            Value::String(text) => vec![text.clone()],
            Value::Array(all) => {
                all.iter().filter_map(|one| one.as_str().or_else(|| one.get("cmd")?.as_str())).map(str::to_owned).collect()
            }
            _ => return None,
        };
        let commands =
            commands.into_iter().filter_map(|command| if command == "..." { anyway.map(str::to_owned) } else { Some(command) });
        Some(commands.collect::<Vec<_>>().join(" && ")).filter(|text| !text.trim().is_empty())
    }

    fn at(&self, needle: &str) -> Option<usize> {
        line_of(&self.text, needle)
    }

    fn why(&self) -> String {
        format!("set in {}", self.file)
    }

    /// Applies a command with the given method of the draft.
    fn step(&mut self, pointer: &str, anyway: Option<&str>, record: fn(&mut Draft, &str, Source<'_>, &str)) {
        if let Some(command) = self.command(pointer, anyway) {
            let (line, why) = (self.at(first_line(&command)), self.why());
            record(self.draft, &command, Source { file: self.file, line }, &why);
        }
    }

    fn install(&mut self, pointer: &str) {
        let anyway = self.draft.plan.build.install.clone();
        self.step(pointer, anyway.as_deref(), Draft::install);
    }

    fn build(&mut self, pointer: &str) {
        let anyway = self.draft.plan.build.build.clone();
        self.step(pointer, anyway.as_deref(), Draft::build);
    }

    fn release(&mut self, pointer: &str) {
        self.step(pointer, None, Draft::release);
    }

    fn process(&mut self, name: &str, pointer: &str) {
        if !is_process_name(name) {
            let text = format!("{} names a process type `{}`, which is ignored", self.file, truncate_to(name, 100));
            return self.draft.add_question("processes", &text, "[processes]\nweb = \"the command that starts it\"");
        }
        if let Some(command) = self.command(pointer, None) {
            let (line, why) = (self.at(first_line(&command)), self.why());
            self.draft.process(name, &command, Source { file: self.file, line }, &why, 1.0);
            if self.draft.plan.kind == Kind::Static && name == "web" {
                self.draft.kind(Kind::Web);
            }
        }
    }

    fn output(&mut self, pointer: &str) {
        let Some(folder) = self.get(pointer).and_then(|value| value.as_str().map(str::to_owned)) else { return };
        let (line, why) = (self.at(&folder), self.why());
        let folder = folder.trim_start_matches("./").trim_matches('/').to_owned();
        let folder = if folder.is_empty() { ".".to_owned() } else { folder };
        if !folder.starts_with("..") {
            self.draft.output(&folder, Source { file: self.file, line }, &why, 1.0);
            if self.draft.plan.processes.is_empty() {
                self.draft.kind(Kind::Static);
            }
        }
    }

    fn health_check(&mut self, pointer: &str) {
        let Some(path) = self.get(pointer).and_then(|value| value.as_str().map(str::to_owned)) else { return };
        if path.starts_with('/') {
            let (line, why) = (self.at(&path), self.why());
            self.draft.health_check(&path, Source { file: self.file, line }, &why, 1.0);
        }
    }

    fn env(&mut self, pointer: &str) {
        for (name, value) in self.get(pointer).as_ref().and_then(Value::as_object).into_iter().flatten() {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            self.draft.plan.build.env.insert(name.clone(), value);
        }
    }

    fn packages(&mut self, pointer: &str) {
        for package in self.get(pointer).as_ref().and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str) {
            if package != "..." {
                let (line, why) = (self.at(package), self.why());
                self.draft.system_package(package, Source { file: self.file, line }, &why);
            }
        }
    }

    fn single_page(&mut self, line: Option<usize>) {
        self.draft.plan.networking.single_page = true;
        let why = self.why();
        self.draft.add_evidence("networking.single_page", "true", Source { file: self.file, line }, &why, 1.0);
    }
}

fn first_line(command: &str) -> &str {
    command.split(" && ").next().unwrap_or(command)
}

type Read = fn(&mut Other<'_>);

const FILES: [(&str, Read); 12] = [
    ("project.toml", buildpacks),
    ("netlify.toml", netlify),
    ("vercel.json", vercel),
    ("fly.toml", fly),
    ("render.yaml", render),
    ("captain-definition", caprover),
    ("heroku.yml", heroku),
    ("railway.toml", railway),
    ("railway.json", railway),
    ("railpack.json", railpack),
    ("nixpacks.json", nixpacks),
    ("nixpacks.toml", nixpacks),
];

/// Applies the files of other platforms. A malformed one is ignored and becomes a question.
pub fn others(repo: &Repo<'_>, draft: &mut Draft) {
    for (file, read) in FILES {
        if !repo.has(file) {
            continue;
        }
        let value = match file.rsplit('.').next() {
            Some("toml") => repo.toml(file).map(|table| table.and_then(|table| serde_json::to_value(table).ok())),
            Some("yaml" | "yml") => repo.yaml(file),
            _ => repo.json(file),
        };
        match value {
            Ok(Some(value)) => read(&mut Other { file, text: repo.text(file), value, draft }),
            Ok(None) => {}
            Err(error) => draft.add_question(file, &format!("{error}; the file is ignored"), "# fix the file, or remove it"),
        }
    }
}

fn nixpacks(other: &mut Other<'_>) {
    other.install("/phases/install/cmds");
    other.build("/phases/build/cmds");
    other.process("web", "/start/cmd");
    other.env("/variables");
    other.packages("/phases/setup/aptPkgs");
}

fn railpack(other: &mut Other<'_>) {
    other.install("/steps/install/commands");
    other.build("/steps/build/commands");
    other.process("web", "/deploy/startCommand");
    other.env("/deploy/variables");
    other.packages("/buildAptPackages");
    other.packages("/deploy/aptPackages");
}

fn railway(other: &mut Other<'_>) {
    other.build("/build/buildCommand");
    other.process("web", "/deploy/startCommand");
    other.release("/deploy/preDeployCommand");
    other.health_check("/deploy/healthcheckPath");
}

fn vercel(other: &mut Other<'_>) {
    other.install("/installCommand");
    other.build("/buildCommand");
    // Where a server is started, it knows its own files.
    if other.draft.plan.processes.is_empty() {
        other.output("/outputDirectory");
    }
    let rewrites = other.get("/rewrites").and_then(|all| all.as_array().cloned()).unwrap_or_default();
    let to_page =
        |rule: &Value| rule.get("destination").and_then(Value::as_str).is_some_and(|to| matches!(to, "/index.html" | "/"));
    if rewrites.iter().any(to_page) {
        other.single_page(other.at("\"destination\""));
    }
}

fn netlify(other: &mut Other<'_>) {
    let base =
        other.get("/build/base").and_then(|base| base.as_str().map(|base| base.trim_matches('/').to_owned())).unwrap_or_default();
    other.build("/build/command");
    if other.draft.plan.processes.is_empty() {
        other.output("/build/publish");
    }
    other.env("/build/environment");
    if !base.is_empty() {
        let line = other.at("base");
        other.draft.add_evidence("build.root", &base, Source { file: other.file, line }, "netlify.toml builds there", 0.8);
        other.draft.add_question("build.root", &format!("netlify.toml builds in {base}"), &format!("[build]\nroot = \"{base}\""));
    }
    let redirects = other.get("/redirects").and_then(|all| all.as_array().cloned()).unwrap_or_default();
    let to_page = |rule: &Value| {
        rule.get("from").and_then(Value::as_str) == Some("/*")
            && rule.get("to").and_then(Value::as_str) == Some("/index.html")
            && rule.get("status").and_then(Value::as_u64) == Some(200)
    };
    if redirects.iter().any(to_page) {
        other.single_page(other.at("/index.html"));
    }
}

fn fly(other: &mut Other<'_>) {
    other.release("/deploy/release_command");
    let processes = other.get("/processes");
    for (name, _) in processes.as_ref().and_then(Value::as_object).into_iter().flatten() {
        other.process(if name == "app" { "web" } else { name }, &format!("/processes/{name}"));
    }
    other.env("/env");
    let port = other.get("/http_service/internal_port").or_else(|| other.get("/services/0/internal_port"));
    if let Some(port) = port.and_then(|port| u16::try_from(port.as_u64()?).ok()) {
        let (line, why) = (other.at("internal_port"), other.why());
        other.draft.port(port, Source { file: other.file, line }, &why, 1.0);
    }
    other.health_check("/http_service/checks/0/path");
}

fn render(other: &mut Other<'_>) {
    let services = other.get("/services").and_then(|all| all.as_array().cloned()).unwrap_or_default();
    for (index, service) in services.iter().enumerate() {
        let at = |name: &str| format!("/services/{index}/{name}");
        match service.get("type").and_then(Value::as_str) {
            Some("web" | "static_site" | "pserv") => {
                other.build(&at("buildCommand"));
                other.process("web", &at("startCommand"));
                other.release(&at("preDeployCommand"));
                other.health_check(&at("healthCheckPath"));
                other.output(&at("staticPublishPath"));
            }
            Some(kind @ ("worker" | "cron")) => other.process(kind, &at("startCommand")),
            Some("redis" | "keyvalue") => {
                let line = other.at("redis").or_else(|| other.at("keyvalue"));
                other.draft.need("redis", Source { file: other.file, line }, "a service of render.yaml");
            }
            _ => {}
        }
    }
    if other.get("/databases/0").is_some() {
        let line = other.at("databases:");
        other.draft.need("postgresql", Source { file: other.file, line }, "a database of render.yaml");
    }
}

fn heroku(other: &mut Other<'_>) {
    for (name, _) in other.get("/run").as_ref().and_then(Value::as_object).into_iter().flatten() {
        let pointer = if other.get(&format!("/run/{name}/command")).is_some() {
            format!("/run/{name}/command")
        } else {
            format!("/run/{name}")
        };
        other.process(name, &pointer);
    }
    other.release("/release/command");
    for addon in other.get("/setup/addons").and_then(|all| all.as_array().cloned()).unwrap_or_default() {
        let plan = addon.get("plan").and_then(Value::as_str).unwrap_or_default().split(':').next().unwrap_or_default().to_owned();
        let need = match plan.as_str() {
            "heroku-postgresql" => "postgresql",
            "heroku-redis" => "redis",
            _ => continue,
        };
        let line = other.at(&plan);
        other.draft.need(need, Source { file: other.file, line }, &format!("the add-on {plan}"));
    }
}

fn caprover(other: &mut Other<'_>) {
    if let Some(path) =
        other.get("/dockerfilePath").and_then(|path| path.as_str().map(|path| path.trim_start_matches("./").to_owned()))
    {
        other.draft.add_question(
            "build.dockerfile",
            &format!("captain-definition builds with {path}"),
            &format!("[build]\ndockerfile = \"{path}\""),
        );
    }
}

fn buildpacks(other: &mut Other<'_>) {
    for pointer in ["/build/env", "/io/buildpacks/build/env", "/io/buildpacks/env/build"] {
        for variable in other.get(pointer).and_then(|all| all.as_array().cloned()).unwrap_or_default() {
            if let (Some(name), Some(value)) =
                (variable.get("name").and_then(Value::as_str), variable.get("value").and_then(Value::as_str))
            {
                other.draft.plan.build.env.insert(name.to_owned(), value.to_owned());
            }
        }
    }
}
