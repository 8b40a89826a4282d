//! Extensions of PHP: its official image compiles them, and has none of Debian's.

use super::WORK;
use super::recipes::Recipe;

/// What is in the image already.
const THERE: &[&str] = &[
    "cli",
    "common",
    "ctype",
    "curl",
    "dom",
    "fileinfo",
    "fpm",
    "ftp",
    "json",
    "mbstring",
    "mysqlnd",
    "phar",
    "posix",
    "readline",
    "simplexml",
    "sodium",
    "sqlite3",
    "tokenizer",
    "xml",
    "zlib",
];

/// Those of PHP itself: Debian's name, the extensions of it, and packages that they take.
const OWN: &[(&str, &str, &str)] = &[
    ("bcmath", "bcmath", ""),
    ("bz2", "bz2", "libbz2-dev"),
    ("calendar", "calendar", ""),
    ("exif", "exif", ""),
    ("ffi", "ffi", "libffi-dev"),
    ("gd", "gd", "libfreetype-dev libjpeg62-turbo-dev libpng-dev libwebp-dev"),
    ("gettext", "gettext", ""),
    ("gmp", "gmp", "libgmp-dev"),
    ("intl", "intl", "libicu-dev"),
    ("ldap", "ldap", "libldap2-dev"),
    ("mysql", "mysqli pdo_mysql", ""),
    ("opcache", "opcache", ""),
    ("pcntl", "pcntl", ""),
    ("pgsql", "pdo_pgsql pgsql", "libpq-dev"),
    ("shmop", "shmop", ""),
    ("soap", "soap", "libxml2-dev"),
    ("sockets", "sockets", ""),
    ("sysvmsg", "sysvmsg", ""),
    ("sysvsem", "sysvsem", ""),
    ("sysvshm", "sysvshm", ""),
    ("tidy", "tidy", "libtidy-dev"),
    ("xsl", "xsl", "libxslt1-dev"),
    ("zip", "zip", "libzip-dev"),
];

/// What others, from PECL, take.
const PECL: &[(&str, &str)] = &[
    ("amqp", "librabbitmq-dev"),
    ("event", "libevent-dev libssl-dev"),
    ("imagick", "libmagickwand-dev"),
    ("memcached", "libmemcached-dev libssl-dev zlib1g-dev"),
    ("mongodb", "libssl-dev"),
    ("rdkafka", "librdkafka-dev"),
    ("ssh2", "libssh2-1-dev"),
    ("swoole", "libssl-dev libstdc++6"),
    ("uuid", "uuid-dev"),
    ("yaml", "libyaml-dev"),
];

/// Compiles what is asked for as `php-gd` or `php8.3-gd`, and takes it into the finished image.
pub fn extend(recipe: &mut Recipe) {
    let name = |package: &str| {
        let rest = package.strip_prefix("php")?.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
        rest.strip_prefix('-').map(str::to_owned)
    };
    let mut names: Vec<String> = recipe.system_packages.iter().filter_map(|package| name(package)).collect();
    recipe.system_packages.retain(|package| name(package).is_none());
    let is_plain =
        |name: &str| !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.'));
    names.retain(|name| is_plain(name) && !THERE.contains(&name.as_str()));
    names.sort();
    names.dedup();
    if names.is_empty() {
        return;
    }
    let (mut own, mut others) = (Vec::new(), Vec::new());
    for name in &names {
        let packages = if let Some((_, extensions, packages)) = OWN.iter().find(|(known, ..)| known == name) {
            own.push(*extensions);
            *packages
        } else {
            others.push(name.as_str());
            PECL.iter().find(|(known, _)| known == name).map_or("", |(_, packages)| *packages)
        };
        recipe.system_packages.extend(packages.split_whitespace().map(str::to_owned));
    }
    if own.contains(&"gd") {
        recipe.prepare.push("docker-php-ext-configure gd --with-freetype --with-jpeg --with-webp".into());
    }
    if own.contains(&"ldap") {
        recipe.prepare.push("docker-php-ext-configure ldap --with-libdir=\"lib/$(gcc -dumpmachine)\"".into());
    }
    if !own.is_empty() {
        recipe.prepare.push(format!("docker-php-ext-install -j\"$(nproc)\" {}", own.join(" ")));
    }
    for name in others {
        // What it asks is answered by a line that is empty.
        recipe.prepare.push(format!("printf '\\n\\n\\n\\n\\n\\n\\n\\n' | pecl install {name} && docker-php-ext-enable {name}"));
    }
    recipe.artifacts = vec![WORK, "/usr/local/lib/php/extensions", "/usr/local/etc/php/conf.d"];
}

#[cfg(test)]
mod tests {
    use super::{Recipe, extend};

    #[test]
    fn an_extension_is_compiled_by_its_name_and_nothing_else_is() {
        let packages =
            ["php8.3-gd", "php-xml", "php-redis", "php-a; rm -rf /", "php-a\nUSER root", "php-", "ffmpeg", "phpmyadmin"];
        let mut recipe = Recipe { system_packages: packages.map(str::to_owned).to_vec(), ..Recipe::default() };
        extend(&mut recipe);
        let taken = ["ffmpeg", "phpmyadmin", "libfreetype-dev", "libjpeg62-turbo-dev", "libpng-dev", "libwebp-dev"];
        assert_eq!(recipe.system_packages, taken, "Debian's, and what gd takes");
        let lines = recipe.prepare.join("\n");
        assert!(lines.contains("docker-php-ext-install -j\"$(nproc)\" gd\n") && lines.contains("pecl install redis"), "{lines}");
        assert!(!lines.contains("rm -rf") && !lines.contains("USER") && !lines.contains("install a"), "{lines}");
    }
}
