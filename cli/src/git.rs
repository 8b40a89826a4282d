//! Reads commits and changes of a repository with the `git` program. Programs that the repository's configuration names
//! are not run, except file filters, which git needs to compare files.

use std::cell::RefCell;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, anyhow, bail};
use capsule_buildplan::{Listing, MAX_FILE_BYTES};

/// The files of a commit below a folder of the working tree. Each file is read on demand.
pub fn commit(folder: &Path, revision: &str) -> anyhow::Result<Listing<'static>> {
    // The tree of this folder in the commit. Paths are relative to it.
    let prefix = text(&run(folder, &["rev-parse", "--show-prefix"])?)?;
    let tree = format!("{revision}:{}", prefix.trim_end_matches('\n'));
    let verified = run(folder, &["rev-parse", "--verify", "--end-of-options", &tree]);
    let tree = text(&verified.with_context(|| format!("There is no commit `{revision}` that contains this folder"))?)?;
    let tree = tree.trim_end();
    let mut paths = Vec::new();
    for entry in run(folder, &["ls-tree", "-r", "-z", "--full-tree", tree])?.split(|byte| *byte == 0) {
        // `100644 blob 0123…`, a tab, and the name. Links and submodules have other modes. A plan does not use files
        // whose names are not UTF-8.
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

/// The files below a folder that changed since a revision, including untracked ones.
pub fn changed(folder: &Path, since: &str) -> anyhow::Result<Vec<String>> {
    let differ = ["diff", "--name-only", "--relative", "--no-ext-diff", "--no-textconv", "-z", "--end-of-options", since, "--"];
    let mut names = run(folder, &differ).with_context(|| format!("Cannot list the changes since `{since}`"))?;
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
    let finished =
        git(folder).args(arguments).output().context("Cannot start git, which is needed to read commits. Install it")?;
    if !finished.status.success() {
        let message = String::from_utf8_lossy(&finished.stderr);
        bail!("git: {}", message.trim().trim_start_matches("fatal: ").trim_start_matches("error: "));
    }
    Ok(finished.stdout)
}

fn text(bytes: &[u8]) -> anyhow::Result<String> {
    String::from_utf8(bytes.to_vec()).map_err(|_| anyhow!("git printed a path that is not UTF-8"))
}

/// Reads objects by name, through one `git cat-file --batch`.
struct Objects {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Objects {
    fn open(folder: &Path) -> anyhow::Result<Self> {
        let mut command = git(folder);
        command.args(["cat-file", "--batch"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut process = command.spawn().context("cannot start git")?;
        let pipes = process.stdin.take().zip(process.stdout.take());
        let (input, output) = pipes.context("git has no standard input or output")?;
        Ok(Self { process, input, output: BufReader::new(output) })
    }

    /// The content of a blob. `None` if there is none of this name, or if it exceeds the maximum size that a plan reads.
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
        // The content is followed by a newline.
        let mut all = self.output.by_ref().take(size + 1);
        let mut content = Vec::new();
        all.by_ref().take(size.min(MAX_FILE_BYTES)).read_to_end(&mut content)?;
        std::io::copy(&mut all, &mut std::io::sink())?;
        Ok((size <= MAX_FILE_BYTES).then_some(content))
    }
}

impl Drop for Objects {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
