//! Ruby with Bundler.

use super::{Pin, pinned, version};
use crate::dependencies::Dependencies;
use crate::frameworks::{self, Found, Type};
use crate::plan::{Draft, Kind, PlanError, Source};
use crate::tree::{Repo, line_of};

const FILE: &str = "Gemfile";

pub fn is_there(repo: &Repo<'_>) -> Option<String> {
    let marker = repo.first(&[FILE, "gems.rb", "config.ru", "Rakefile"]);
    let marker = marker.filter(|file| *file != "Rakefile" || repo.ending("", ".gemspec").is_some()).map(str::to_owned);
    marker
        .or_else(|| repo.first(&["app.rb", "main.rb", "server.rb"]).map(str::to_owned))
        .or_else(|| repo.ending("", ".gemspec"))
        .or_else(|| {
            repo.first(&["_config.yml"]).filter(|_| repo.has_folder("_posts") || repo.has_folder("_layouts")).map(str::to_owned)
        })
}

pub fn detect(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    let marker = is_there(repo).unwrap_or_default();
    draft.language("ruby", Source::file(&marker));
    let file = repo.first(&[FILE, "gems.rb"]).unwrap_or(FILE);
    let text = repo.text(file);
    let mut dependencies = Dependencies::default();
    let mut wanted = None;
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if let Some(rest) = line.strip_prefix("gem ").or_else(|| line.strip_prefix("gem(")) {
            if let Some(name) = quoted(rest) {
                dependencies.add(name, file, Some(index + 1));
            }
        } else if let Some(rest) = line.strip_prefix("ruby ").or_else(|| line.strip_prefix("ruby(")) {
            wanted = quoted(rest).map(|version| Pin::new(version, file, Some(index + 1)));
        }
    }
    let lock = repo.text("Gemfile.lock");
    let locked = || {
        let line = lock.lines().position(|line| line == "RUBY VERSION")? + 1;
        let version = lock.lines().nth(line)?.trim().trim_start_matches("ruby ").split('p').next()?;
        Some(Pin::new(version, "Gemfile.lock", Some(line + 1)))
    };
    version(draft, "ruby", wanted.or_else(|| pinned(repo, &["ruby"], &[(".ruby-version", "ruby-")])).or_else(locked));
    if !text.is_empty() {
        draft.package_manager("bundler", Source::file(file), "a Gemfile exists");
        draft.install("bundle install", Source::file(if lock.is_empty() { file } else { "Gemfile.lock" }), "the gems it names");
        draft.plan.build.env.insert("BUNDLE_PATH".into(), "vendor/bundle".into());
        draft.plan.build.env.insert("BUNDLE_WITHOUT".into(), "development:test".into());
        if !lock.is_empty() {
            draft.plan.build.env.insert("BUNDLE_DEPLOYMENT".into(), "true".into());
        }
    }
    let found = frameworks::find("ruby", &dependencies, repo);
    if let Some(found) = &found {
        draft.found(found);
    }
    start(repo, &dependencies, found.as_ref(), draft);
    dependencies.conclude("ruby", draft);
    Ok(())
}

fn start(repo: &Repo<'_>, dependencies: &Dependencies, found: Option<&Found>, draft: &mut Draft) {
    let Some(found) = found else {
        if let Some(file) = repo.first(&["app.rb", "main.rb", "server.rb", "bot.rb"]) {
            let text = repo.text(file);
            let serves = ["WEBrick", "TCPServer", "Rack", "Sinatra"].iter().find_map(|sign| line_of(&text, sign));
            let process = if serves.is_some() { "web" } else { "worker" };
            draft.process(
                process,
                &format!("ruby {file}"),
                Source { file, line: serves },
                "a file of this name usually starts it",
                0.6,
            );
            if serves.is_some() {
                draft.default_port(None, 3000, Source::file(file));
            } else {
                draft.add_question(
                    "processes.web",
                    &format!("{file} does not look like a server; treated as a worker"),
                    &format!("[processes]\nweb = \"ruby {file}\""),
                );
            }
        } else if repo.ending("", ".gemspec").is_some() {
            draft.kind(Kind::Library);
        }
        return;
    };
    let row = found.framework;
    if row.kind.is_files() {
        let command = match row.name {
            "jekyll" if repo.has(FILE) => "bundle exec jekyll build",
            "jekyll" => "jekyll build",
            "middleman" => "bundle exec middleman build",
            "bridgetown" => "bin/bridgetown deploy",
            _ => "bundle exec nanoc compile",
        };
        draft.build(command, found.source(), &format!("how {} makes the pages", row.title));
        if row.name == "jekyll" {
            draft.plan.build.env.insert("JEKYLL_ENV".into(), "production".into());
        }
        return draft.files(found, row.output.unwrap_or("_site"));
    }
    if row.kind == Type::Worker {
        let file = repo.first(&["bot.rb", "main.rb", "app.rb"]);
        let command = row.start.map(str::to_owned).or_else(|| file.map(|file| format!("bundle exec ruby {file}")));
        if let Some(command) = command {
            draft.process("worker", &command, found.source(), &format!("how {} is started", row.title), 0.8);
        }
        return;
    }
    let puma = dependencies.find("puma");
    let (command, source, reason) = match row.name {
        "rails" if puma.is_some() && repo.has("config/puma.rb") => (
            "bundle exec puma --config config/puma.rb".to_owned(),
            Source::file("config/puma.rb"),
            "Puma with the application's settings",
        ),
        "rails" => (row.start.unwrap_or_default().to_owned(), found.source(), "how Ruby on Rails is started"),
        _ if repo.has("config.ru") => {
            let servers = [
                ("puma", "bundle exec puma --bind tcp://0.0.0.0:$PORT"),
                ("falcon", "bundle exec falcon serve --bind http://0.0.0.0:$PORT"),
                ("unicorn", "bundle exec unicorn --listen 0.0.0.0:$PORT"),
                ("thin", "bundle exec thin start --address 0.0.0.0 --port $PORT"),
                ("iodine", "bundle exec iodine -b 0.0.0.0 -p $PORT"),
            ];
            let server = servers.iter().find(|(gem, _)| dependencies.has(gem));
            let command = server.map_or("bundle exec rackup --host 0.0.0.0 --port $PORT", |(_, command)| command);
            (command.to_owned(), Source::file("config.ru"), "the Rack application")
        }
        _ => {
            let file = repo.first(&["app.rb", "main.rb", "server.rb", "web.rb", "application.rb"]).unwrap_or("app.rb");
            (row.start.unwrap_or_default().replace("{file}", file), found.source(), "how it is started")
        }
    };
    draft.process("web", &command, source, reason, 0.9);
    draft.default_port(Some(found), 3000, found.source());
    if row.name == "rails" {
        if repo.has_folder("app/assets") || dependencies.has("sprockets-rails") || dependencies.has("propshaft") {
            draft.build(
                "SECRET_KEY_BASE_DUMMY=1 bundle exec rails assets:precompile",
                found.source(),
                "the assets are made once",
            );
        }
        if repo.has_folder("db/migrate") || repo.has("db/schema.rb") {
            let file = if repo.has("db/schema.rb") { "db/schema.rb" } else { "db/migrate" };
            draft.release("bundle exec rails db:migrate", Source::file(file), "Rails' migrations");
        }
        for (name, value) in [("RAILS_ENV", "production"), ("RAILS_LOG_TO_STDOUT", "true"), ("RAILS_SERVE_STATIC_FILES", "true")]
        {
            draft.plan.build.env.insert(name.into(), value.into());
        }
        let version_up = repo.text("config/routes.rb");
        if let Some(line) = line_of(&version_up, "rails/health#show") {
            draft.health_check("/up", Source { file: "config/routes.rb", line: Some(line) }, "Rails' own health check", 1.0);
        }
    }
    if let Some(worker) = dependencies.find("sidekiq").filter(|_| row.name != "sidekiq") {
        draft.process(
            "worker",
            "bundle exec sidekiq",
            Source { file: &worker.file, line: worker.line },
            "dependency \"sidekiq\"",
            0.8,
        );
    } else if let Some(worker) = dependencies.find("good_job") {
        draft.process(
            "worker",
            "bundle exec good_job start",
            Source { file: &worker.file, line: worker.line },
            "dependency \"good_job\"",
            0.8,
        );
    } else if repo.has("bin/jobs")
        && let Some(worker) = dependencies.find("solid_queue")
    {
        draft.process("worker", "bin/jobs", Source { file: &worker.file, line: worker.line }, "dependency \"solid_queue\"", 0.8);
    }
}

/// The first quoted word of a line.
fn quoted(text: &str) -> Option<&str> {
    let start = text.find(['"', '\''])?;
    let quote = text[start..].chars().next()?;
    text[start + 1..].split(quote).next().filter(|word| !word.is_empty())
}
