//! What a repository knows, asked of the `git` program. Of the programs that a repository's own configuration
//! may name, none is run, but for filters of files, without which git cannot compare any.

use std::cell::RefCell;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, anyhow, bail};
use capsule_buildplan::{Listing, MOST_BYTES};

/// The files of a commit below a folder of the working tree, each read when it is asked for.
pub fn commit(folder: &Path, revision: &str) -> anyhow::Result<Listing<'static>> {
    // The tree of this folder in that commit; what follows names everything from there on.
    let prefix = text(&run(folder, &["rev-parse", "--show-prefix"])?)?;
    let tree = format!("{revision}:{}", prefix.trim_end_matches('\n'));
    let verified = run(folder, &["rev-parse", "--verify", "--end-of-options", &tree]);
    let tree = text(&verified.with_context(|| format!("there is no commit `{revision}` with this folder in it"))?)?;
    let tree = tree.trim_end();
    let mut paths = Vec::new();
    for entry in run(folder, &["ls-tree", "-r", "-z", "--full-tree", tree])?.split(|byte| *byte == 0) {
        // `100644 blob 0123… name`, the name behind a tab; links and submodules are of other kinds. Names
        // that are not text hold nothing that a plan is made from.
        if let Ok(entry) = std::str::from_utf8(entry)
            && let Some((kind, path)) = entry.split_once('\t')
            && kind.starts_with("100")
        {
            paths.push(path.to_owned());
        }
    }
    let reader = RefCell::new(Objects::open(folder)?);
    let tree = tree.to_owned();
    Ok(Listing::new(paths, move |path| reader.borrow_mut().read(&format!("{tree}:{path}")).ok().flatten()))
}

/// The files below a folder that are not as they were in a revision, those that git does not know among them.
pub fn changed(folder: &Path, since: &str) -> anyhow::Result<Vec<String>> {
    let differ = ["diff", "--name-only", "--relative", "--no-ext-diff", "--no-textconv", "-z", "--end-of-options", since, "--"];
    let mut names = run(folder, &differ).with_context(|| format!("what has changed since `{since}` cannot be told"))?;
    names.extend(run(folder, &["ls-files", "--others", "--exclude-standard", "-z"])?);
    let names = names.split(|byte| *byte == 0).filter(|name| !name.is_empty());
    Ok(names.map(|name| String::from_utf8_lossy(name).into_owned()).collect())
}

fn git(folder: &Path) -> Command {
    let mut command = Command::new("git");
    command.arg("-C").arg(folder).args(["-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null"]);
    command.envs([("GIT_OPTIONAL_LOCKS", "0"), ("GIT_NO_LAZY_FETCH", "1")]).stdin(Stdio::null()).stderr(Stdio::piped());
    command
}

fn run(folder: &Path, arguments: &[&str]) -> anyhow::Result<Vec<u8>> {
    let done = git(folder).args(arguments).output().context("git is needed to look into commits, and cannot be started")?;
    if !done.status.success() {
        let told = String::from_utf8_lossy(&done.stderr);
        bail!("git: {}", told.trim().trim_start_matches("fatal: ").trim_start_matches("error: "));
    }
    Ok(done.stdout)
}

fn text(bytes: &[u8]) -> anyhow::Result<String> {
    String::from_utf8(bytes.to_vec()).map_err(|_| anyhow!("git names a folder that is not UTF-8"))
}

/// Reads one object after the other.
struct Objects {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Objects {
    fn open(folder: &Path) -> anyhow::Result<Self> {
        let mut command = git(folder);
        command.args(["cat-file", "--batch"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut process = command.spawn().context("git cannot be started")?;
        let pipes = process.stdin.take().zip(process.stdout.take());
        let (input, output) = pipes.context("git has no pipes")?;
        Ok(Self { process, input, output: BufReader::new(output) })
    }

    /// An object's content; nothing if there is none of this name, or if it is too large to decide anything.
    fn read(&mut self, name: &str) -> std::io::Result<Option<Vec<u8>>> {
        if name.contains('\n') {
            return Ok(None);
        }
        writeln!(self.input, "{name}")?;
        let mut head = String::new();
        self.output.read_line(&mut head)?;
        // `0123… blob 17`, or `… missing`.
        let Some(size) = head.rsplit_once(" blob ").and_then(|(_, size)| size.trim().parse::<u64>().ok()) else {
            return Ok(None);
        };
        // With the end of the line behind it.
        let mut all = self.output.by_ref().take(size + 1);
        let mut content = Vec::new();
        all.by_ref().take(size.min(MOST_BYTES)).read_to_end(&mut content)?;
        std::io::copy(&mut all, &mut std::io::sink())?;
        Ok((size <= MOST_BYTES).then_some(content))
    }
}

impl Drop for Objects {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
