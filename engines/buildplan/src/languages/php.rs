//! PHP with Composer, or without.

use serde_json::Value;

use super::{Pin, pinned, version};
use crate::dependencies::Dependencies;
use crate::frameworks::{self, Found};
use crate::plan::{Draft, Kind, PlanError, Source};
use crate::tree::{Repo, line_of};

const FILE: &str = "composer.json";
const LOCK: &str = "composer.lock";

pub fn is_there(repo: &Repo<'_>) -> Option<String> {
    let marker = repo.first(&[FILE, "index.php", "public/index.php", "web/index.php", "wp-config.php", "wp-load.php", "artisan"]);
    marker.map(str::to_owned).or_else(|| repo.ending("", ".php"))
}

pub fn detect(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    let marker = is_there(repo).unwrap_or_default();
    draft.language("php", Source::file(&marker));
    let json = repo.json(FILE)?.unwrap_or(Value::Null);
    let text = repo.text(FILE);
    let mut dependencies = Dependencies::default();
    for (name, _) in json.get("require").and_then(Value::as_object).into_iter().flatten() {
        dependencies.add(name, FILE, line_of(&text, &format!("\"{name}\"")));
    }
    let required = json.pointer("/require/php").and_then(Value::as_str);
    let platform = json.pointer("/config/platform/php").and_then(Value::as_str);
    let own = platform.or(required).map(|wanted| Pin::new(wanted, FILE, line_of(&text, "\"php\"")));
    version(draft, "php", own.or_else(|| pinned(repo, &["php"], &[(".php-version", "")])));
    if !json.is_null() {
        draft.package_manager("composer", Source::file(FILE), "composer.json exists");
        let lock = repo.first(&[LOCK]);
        draft.install(
            "composer install --no-dev --no-interaction --prefer-dist --optimize-autoloader",
            Source::file(lock.unwrap_or(FILE)),
            if lock.is_some() { "the versions in the lockfile" } else { "no lockfile: versions are not pinned" },
        );
    }
    for name in json.get("require").and_then(Value::as_object).into_iter().flatten().map(|(name, _)| name) {
        if let Some(extension) = name.strip_prefix("ext-") {
            add_extension(extension, FILE, line_of(&text, &format!("\"{name}\"")), draft);
        }
    }
    for (extension, line) in locked(&repo.text(LOCK)) {
        add_extension(extension, LOCK, Some(line), draft);
    }
    let found = frameworks::find("php", &dependencies, repo);
    if let Some(found) = &found {
        draft.found(found);
        databases(found, &dependencies, draft);
    }
    start(repo, found.as_ref(), &marker, draft);
    dependencies.conclude("php", draft);
    Ok(())
}

/// Debian's package of an extension that PHP has not in itself.
fn add_extension(extension: &str, file: &str, line: Option<usize>, draft: &mut Draft) {
    let package = match extension {
        "json" | "ctype" | "tokenizer" | "filter" | "hash" | "pcre" | "session" | "fileinfo" | "iconv" | "openssl" | "phar"
        | "pdo" | "spl" | "date" | "reflection" | "standard" | "zlib" | "libxml" | "sodium" => return,
        "dom" | "simplexml" | "xmlwriter" | "xmlreader" => "xml",
        "pdo_pgsql" => "pgsql",
        "pdo_mysql" | "mysqli" => "mysql",
        "pdo_sqlite" => "sqlite3",
        other => other,
    };
    draft.system_package(&format!("php-{package}"), Source { file, line }, &format!("extension {extension}"));
}

/// The extensions that locked packages take and no other of them stands in for, with their lines. By lines, as
/// Composer writes them: these files are long.
fn locked(lock: &str) -> Vec<(&str, usize)> {
    let (mut block, mut taken, mut given) = ("", Vec::new(), std::collections::HashSet::new());
    for (index, line) in lock.lines().enumerate() {
        let line = line.trim();
        if line.starts_with("\"packages-dev\"") {
            break;
        }
        match line.strip_suffix(": {") {
            Some(name) => block = name.trim_matches('"'),
            None if line.starts_with('}') => block = "",
            None => {}
        }
        let Some(extension) = line.strip_prefix("\"ext-").and_then(|rest| rest.split('"').next()) else { continue };
        match block {
            "require" => taken.push((extension, index + 1)),
            "provide" | "replace" => drop(given.insert(extension)),
            _ => {}
        }
    }
    taken.retain(|(extension, _)| !given.contains(extension));
    taken.truncate(1000);
    taken
}

/// What a framework that talks to databases takes where the repository names none.
fn databases(found: &Found, dependencies: &Dependencies, draft: &mut Draft) {
    let usual: &[&str] = match found.framework.name {
        "wordpress" | "magento" | "shopware" | "pimcore" | "typo3" | "silverstripe" | "flarum" | "joomla" | "thinkphp" => {
            &["php-mysql"]
        }
        "laravel" | "lumen" | "statamic" | "october" | "drupal" | "craft" | "sylius" | "codeigniter" | "cakephp" | "yii" => {
            &["php-mysql", "php-pgsql"]
        }
        _ if dependencies.0.iter().any(|dependency| dependency.name.starts_with("doctrine/")) => &["php-mysql", "php-pgsql"],
        _ => return,
    };
    let known = ["php-mysql", "php-pgsql", "php-sqlite3", "php-mongodb"];
    if draft.plan.system_packages.iter().any(|package| known.contains(&package.as_str())) {
        return;
    }
    for package in usual {
        draft.system_package(package, found.source(), &format!("{} may keep its data there", found.framework.title));
    }
}

fn start(repo: &Repo<'_>, found: Option<&Found>, marker: &str, draft: &mut Draft) {
    let name = found.map(|found| found.framework.name);
    match name {
        Some("jigsaw") => draft.build("./vendor/bin/jigsaw build production", Source::file(FILE), "how Jigsaw makes the pages"),
        Some("sculpin") => {
            draft.build("./vendor/bin/sculpin generate --env=prod", Source::file(FILE), "how Sculpin makes the pages");
        }
        _ => {}
    }
    if let Some(found) = found.filter(|found| found.framework.kind.is_files()) {
        return draft.files(found, found.framework.output.unwrap_or("output"));
    }
    let own = found.and_then(|found| found.framework.start).filter(|command| !command.starts_with("php artisan"));
    if let Some((command, found)) = own.zip(found) {
        draft.process("web", command, found.source(), &format!("how {} is started", found.framework.title), 0.9);
        return draft.default_port(Some(found), 8080, found.source());
    }
    let root = ["public", "web", "webroot", "htdocs", "www", "docroot"]
        .into_iter()
        .find(|folder| repo.has(&format!("{folder}/index.php")));
    let page = root.map_or_else(|| "index.php".to_owned(), |folder| format!("{folder}/index.php"));
    if root.is_none() && !repo.has("index.php") && found.is_none() {
        let library = repo.has_folder("src") && !repo.text(FILE).contains("\"project\"");
        match repo.all_ending("", ".php").as_slice() {
            [only] => draft.process("worker", &format!("php {only}"), Source::file(only), "the only program here", 0.5),
            _ if library => draft.kind(Kind::Library),
            _ => {}
        }
        return;
    }
    if draft.plan.kind == Kind::Unknown {
        draft.kind(Kind::Web);
    }
    let folder = root.unwrap_or(".");
    // PHP's own server sends every path that is no file to index.php of its folder.
    let command = format!("php -S 0.0.0.0:$PORT -t {folder}");
    let at = if repo.has(&page) { page.as_str() } else { marker };
    draft.process("web", &command, Source::file(at), "the pages under PHP's own server, with several workers", 0.8);
    draft.plan.build.env.insert("PHP_CLI_SERVER_WORKERS".into(), "4".into());
    draft.default_port(found, 8080, Source::file(at));
    if name == Some("laravel") || name == Some("statamic") || name == Some("october") {
        draft.release("php artisan migrate --force", Source::file("artisan"), "Laravel's migrations");
    } else if name == Some("symfony") && repo.has_folder("migrations") {
        draft.release(
            "php bin/console doctrine:migrations:migrate --no-interaction",
            Source::file("bin/console"),
            "Doctrine's migrations",
        );
    }
}
