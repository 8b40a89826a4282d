//! Finds ports in source files and start commands: the default of `PORT`, or the value of a flag.

/// Lines of one statement that are read.
const MAX_LINES: usize = 6;

/// Finds the default of `PORT` in a source file, such as `process.env.PORT || 4000`, and its line.
pub fn default_in(text: &str) -> Option<(u16, usize)> {
    let lines: Vec<&str> = text.lines().take(2000).collect();
    lines.iter().enumerate().find_map(|(index, line)| {
        let code = line.trim_start();
        if let Some(defined) = code.strip_prefix("#define PORT ") {
            return Some((value(defined)?, index + 1));
        }
        if line.len() > 500 || ["//", "#", "*", "/*", "--", ";"].iter().any(|sign| code.starts_with(sign)) {
            return None;
        }
        line.match_indices("PORT").find_map(|(at, word)| {
            let (before, after) = (&line[..at], &line[at + word.len()..]);
            let is_word = !before.ends_with(is_name) && !after.starts_with(is_name);
            let port = is_word.then(|| default_of(&statement(after, &lines[index + 1..]), before)).flatten()?;
            Some((port, index + 1))
        })
    })
}

fn is_name(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The rest of a statement: of this line, and of those that go on with it.
fn statement(rest: &str, next: &[&str]) -> String {
    let mut whole = rest.to_owned();
    for line in next.iter().take(MAX_LINES).map(|line| line.trim()) {
        let goes_on = ["||", "??", ".", "?", ":", "or "].iter().any(|sign| line.starts_with(sign))
            || whole.trim_end().ends_with(['|', '?', '(']);
        if !goes_on || line.len() > 500 {
            break;
        }
        whole.push(' ');
        whole.push_str(line);
    }
    whole
}

/// The default behind a mention of `PORT`.
fn default_of(after: &str, before: &str) -> Option<u16> {
    // `get("PORT", 8000)`: the second argument of what looks it up.
    let is_quoted = before.ends_with(['"', '\'', '`']) && after.starts_with(['"', '\'', '`']);
    let mut rest = after.strip_prefix(['"', '\'', '`']).unwrap_or(after);
    if is_quoted && let Some(argument) = rest.trim_start().strip_prefix(',') {
        return value(argument);
    }
    // `${PORT:-3000}` of a shell, `#{PORT:8080}` and `${PORT:8080}` of Spring's settings.
    if before.ends_with("${") || before.ends_with("#{") {
        return value(rest.strip_prefix(":-").or_else(|| rest.strip_prefix(':')).or_else(|| rest.strip_prefix('-'))?);
    }
    // What closes around it, before any operator: `Number(process.env.PORT) || 3000`.
    rest = rest.trim_start_matches([']', ')', '!', ' ']);
    if let Some(of_method) = ["unwrap_or(", "unwrap_or_else(", "getOrDefault(", "orElse(", "or_else("]
        .iter()
        .filter_map(|method| Some((rest.find(method)?, *method)))
        .min()
        .filter(|(at, _)| is_chain(&rest[..*at]))
    {
        return value(&rest[of_method.0 + of_method.1.len()..]);
    }
    // `ENV.fetch("PORT") { 3000 }`
    if is_quoted && let Some(block) = rest.strip_prefix('{') {
        return value(block);
    }
    // `{ PORT = 3000 } = process.env`, `const PORT = 3000`
    if let Some(given) = rest.strip_prefix(":=").or_else(|| rest.strip_prefix('=').filter(|more| !more.starts_with(['=', '>']))) {
        return value(given);
    }
    otherwise(rest, before)
}

/// What stands behind operators that take over where there is nothing: `||`, `??`, `?:`, `or`, `… ? … : …`.
fn otherwise(rest: &str, before: &str) -> Option<u16> {
    let mut rest = rest;
    for _ in 0..4 {
        let next = ["||", "??", "?:", "or "].iter().find_map(|operator| rest.strip_prefix(operator));
        if let Some(next) = next {
            if let Some(port) = value(next) {
                return Some(port);
            }
            // Another place that it may come from.
            rest = next.trim_start().trim_start_matches(|c: char| is_name(c) || ".?[]\"'`()".contains(c)).trim_start();
            continue;
        }
        // `p ? atoi(p) : 8080`, or its last part behind a second mention.
        let is_choice = rest.starts_with('?') || (rest.starts_with(':') && before.contains('?'));
        if is_choice && let Some((_, last)) = rest.split_once(':').filter(|(between, _)| !between.contains([';', ','])) {
            return value(last);
        }
        return None;
    }
    None
}

/// Whether a text is nothing but methods called one after the other.
fn is_chain(text: &str) -> bool {
    !text.contains([';', '{', '}'])
        && (text.trim().is_empty() || text.trim_start().starts_with('.'))
        && text.trim_end().ends_with('.')
}

/// Parses a port at the beginning of a text, with or without quotes and brackets. Rejects addresses and parts of numbers.
fn value(text: &str) -> Option<u16> {
    let mut text = text.trim_start();
    let wrappers = [
        "Number(",
        "parseInt(",
        "Integer.parseInt(",
        "int(",
        "str(",
        "String(",
        "default=",
        "default:",
        "fallback:",
        "String.valueOf(",
    ];
    let quotes = ["\"", "'", "`", "(", ":", "|_|", "|| ", "||", "_ =>", "() ->", "() =>"];
    while let Some(rest) = wrappers.iter().chain(&quotes).find_map(|sign| text.strip_prefix(sign)) {
        text = rest.trim_start();
    }
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, rest) = text.split_at(end);
    let suffix = ["_u16", "u16", "_u32", "u32", "_i32", "i32", "usize"].iter().find_map(|suffix| rest.strip_prefix(suffix));
    let rest = suffix.unwrap_or(rest);
    // `3000.to_string()` is a method; `127.0` is not.
    let is_more =
        rest.starts_with(is_name) || rest.strip_prefix('.').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    digits.parse().ok().filter(|port| *port >= 80 && !is_more)
}

/// Finds the port that a start command sets by a flag or a variable.
pub fn of_command(command: &str) -> Option<u16> {
    let words: Vec<&str> = command.split_whitespace().take(200).collect();
    let program = words.iter().find(|word| !word.contains('=')).and_then(|word| word.rsplit('/').next()).unwrap_or_default();
    // Programs whose flag `-p` is the port.
    let short = [
        "next",
        "nuxt",
        "serve",
        "http-server",
        "rails",
        "puma",
        "rackup",
        "thin",
        "daphne",
        "uvicorn",
        "hypercorn",
        "php",
        "flask",
    ];
    let of_port = |flag: &str| {
        matches!(flag, "--port" | "--http-port" | "--server.port" | "-Dserver.port") || (flag == "-p" && short.contains(&program))
    };
    let of_address = |flag: &str| matches!(flag, "--bind" | "-b" | "--listen" | "-l" | "--addr" | "-S");
    let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port >= 80);
    let behind = |text: &str| text.rsplit_once(':').and_then(|(_, text)| port(text));
    words.iter().enumerate().find_map(|(at, word)| {
        if let Some((name, given)) = word.split_once('=') {
            return match name {
                "PORT" => port(given),
                flag if of_port(flag) => port(given),
                flag if of_address(flag) => behind(given),
                _ => None,
            };
        }
        let next = words.get(at + 1)?;
        if of_port(word) {
            return port(next);
        }
        if of_address(word) { behind(next) } else { None }
    })
}

#[cfg(test)]
mod tests {
    use super::{default_in, of_command};

    #[test]
    fn only_a_default_of_port_is_a_port() {
        for (text, port) in [
            // JavaScript
            ("app.listen(process.env.PORT || 4000)", Some(4000)),
            ("const port = process.env.PORT ?? 8888", Some(8888)),
            ("const port = Number(process.env.PORT) || 3001;", Some(3001)),
            ("const port = parseInt(process.env.PORT || '3002', 10)", Some(3002)),
            ("const port = +(process.env.PORT ?? `3003`)", Some(3003)),
            ("const port = process.env.PORT ? Number(process.env.PORT) : 3004", Some(3004)),
            ("const port = process.env['PORT'] || 3005", Some(3005)),
            ("const { PORT = 3006 } = process.env", Some(3006)),
            ("const PORT = 3007;", Some(3007)),
            ("const PORT = process.env.PORT || config.port || 3008", Some(3008)),
            ("const port = process.env.PORT ||\n  3009", Some(3009)),
            ("const port = Deno.env.get(\"PORT\") ?? \"8001\"", Some(8001)),
            ("app.listen(process.env.PORT, \"127.0.0.1\")", None),
            ("app.listen(process.env.PORT, '0.0.0.0', 200)", None),
            ("app.listen({ port: process.env.PORT, backlog: 200 })", None),
            ("app.listen(process.env.PORT, 511)", None),
            ("app.listen(process.env.PORT || '127.0.0.1')", None),
            ("const port = process.env.PORT || pick(200)", None),
            ("if (process.env.PORT > 1024) {}", None),
            ("if (process.env.PORT == 1024) {}", None),
            ("const REPORT = 3000; const PORTS = 4000; SUPPORT || 5000", None),
            ("// PORT = 3000", None),
            ("const t = { PORT: process.env.PORT, timeout: 3000 }", None),
            // Python
            ("port = int(os.environ.get(\"PORT\", 8000))", Some(8000)),
            ("port = int(os.environ.get('PORT', '8001'))", Some(8001)),
            ("port = os.getenv(\"PORT\", default=8002)", Some(8002)),
            ("port = os.environ.get(\"PORT\") or 8003", Some(8003)),
            ("uvicorn.run(app, port=int(os.environ[\"PORT\"]), backlog=200)", None),
            ("uvicorn.run(app, port=int(os.environ[\"PORT\"]), host=\"127.0.0.1\")", None),
            ("server.bind((os.environ.get(\"PORT\"), 200))", None),
            // Go
            ("var port = env(\"PORT\", \"3333\")", Some(3333)),
            ("addr := \":\" + os.Getenv(\"PORT\"); timeout := 300", None),
            // Rust
            ("let port = env(\"PORT\").unwrap_or(\"9000\".into());", Some(9000)),
            ("let port = std::env::var(\"PORT\").ok().and_then(|p| p.parse().ok()).unwrap_or(9001);", Some(9001)),
            ("let port = env::var(\"PORT\")\n    .unwrap_or_else(|_| \"9002\".to_string());", Some(9002)),
            ("let port: u16 = env::var(\"PORT\")?.parse()?; let backlog = Some(1).unwrap_or(200);", None),
            // Ruby, PHP, Java, C, shell, Perl
            ("port ENV.fetch(\"PORT\") { 3010 }", Some(3010)),
            ("set :port, ENV['PORT'] || 4567", Some(4567)),
            ("set :port, ENV.fetch('PORT', 4568)", Some(4568)),
            ("$port = getenv('PORT') ?: 8080;", Some(8080)),
            ("$port = $_ENV['PORT'] ?? 8081;", Some(8081)),
            ("int port = Integer.parseInt(System.getenv().getOrDefault(\"PORT\", \"7000\"));", Some(7000)),
            ("int port = getenv(\"PORT\") ? atoi(getenv(\"PORT\")) : 8082;", Some(8082)),
            ("server.port=${PORT:8083}", Some(8083)),
            ("exec server --port \"${PORT:-8084}\"", Some(8084)),
            ("#define PORT 8086", Some(8086)),
            ("my $port = $ENV{PORT} // 8085;", None),
            ("listen(fd, getenv(\"PORT\"), 128);", None),
        ] {
            assert_eq!(default_in(text).map(|(port, _)| port), port, "{text}");
        }
        assert_eq!(default_in("a\nb\nlisten(process.env.PORT || 3000)"), Some((3000, 3)));
    }

    #[test]
    fn a_command_sets_the_port_by_a_flag() {
        for (command, port) in [
            ("next start -p 4000", Some(4000)),
            ("node_modules/.bin/next start --port=4001", Some(4001)),
            ("PORT=4002 node server.js", Some(4002)),
            ("gunicorn --bind 0.0.0.0:8000 app:app", Some(8000)),
            ("gunicorn -b :8001 -w 4 app:app", Some(8001)),
            ("php -S 0.0.0.0:8002 -t public", Some(8002)),
            ("java -Dserver.port=8003 -jar a.jar", Some(8003)),
            ("uvicorn main:app --host 127.0.0.1 --port $PORT", None),
            ("gunicorn --bind 0.0.0.0:$PORT --backlog 200 app:app", None),
            ("mkdir -p 755 && node a.js", None),
            ("node server.js --workers 200", None),
        ] {
            assert_eq!(of_command(command), port, "{command}");
        }
    }
}
