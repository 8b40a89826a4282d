//! `capsule backup`: creates, lists, verifies and restores backups of the installation.

use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use anyhow::{anyhow, bail};
use capsule_backup::{BackupKey, Kind, Report, Repository, Staging};

use crate::arguments::{BackupCommand, BackupOptions};
use crate::server::backup_key;
use crate::server::backups::installation;
use crate::server::configuration::{self, Configuration};
use crate::server::data;
use crate::terminal::{Terminal, table};

pub fn run(directory: &Path, command: &BackupCommand, terminal: Terminal) -> anyhow::Result<()> {
    data::accessible(directory, "backup")?;
    let asynchronous = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    asynchronous.block_on(async {
        match command {
            BackupCommand::Create { full, options } => create(directory, *full, options, terminal).await,
            BackupCommand::List { options } => list(directory, options, terminal).await,
            BackupCommand::Verify { id, options } => verify(directory, id.as_deref(), options, terminal).await,
            BackupCommand::Restore { id, replace, options } => {
                restore(directory, id.as_deref(), *replace, options, terminal).await
            }
        }
    })
}

/// Reads the configuration, and opens the repository that the command line or the configuration names.
fn open(directory: &Path, options: &BackupOptions, key: &Path) -> anyhow::Result<(Configuration, Repository)> {
    let configuration = configuration::load(directory, options.config.as_deref(), &options.set)?.configuration;
    let location = options.at.clone().unwrap_or_else(|| configuration.backup.location.clone());
    if location.is_empty() {
        bail!("No backup location. Use --at with a directory or s3://bucket/prefix, or set backup.location.");
    }
    let key = BackupKey::open(key).map_err(|error| anyhow!("the backup key: {error}"))?;
    Ok((configuration, Repository::open(&location, key).map_err(|error| anyhow!("{error}"))?))
}

/// The path of the key: `--key-file`, or the installation's own.
///
/// # Errors
/// When the file does not exist.
fn key(directory: &Path, options: &BackupOptions) -> anyhow::Result<std::path::PathBuf> {
    let key = options.key_file.clone().unwrap_or_else(|| backup_key(directory));
    if !key.is_file() {
        bail!("The backup key {} does not exist. Give its path with --key-file.", key.display());
    }
    Ok(key)
}

async fn create(directory: &Path, full: bool, options: &BackupOptions, terminal: Terminal) -> anyhow::Result<()> {
    if !directory.join("keys/master.key").is_file() {
        bail!("There is no installation in the data directory {}. Choose the data directory with --data.", directory.display());
    }
    let key = options.key_file.clone().unwrap_or_else(|| backup_key(directory));
    let (configuration, repository) = open(directory, options, &key)?;
    let kind = if full { Kind::Full } else { Kind::Incremental };
    let report = repository.create(&installation(directory, &configuration), kind).await.map_err(|error| anyhow!("{error}"))?;
    terminal.show(&report, |report| {
        format!(
            "Created backup {}: {} rows, {} files; {} new pieces, {} KiB.\nKeep a copy of its key on another machine: {}",
            report.id,
            report.rows,
            report.files,
            report.pieces,
            report.bytes / 1024,
            key.display()
        )
    })
}

async fn list(directory: &Path, options: &BackupOptions, terminal: Terminal) -> anyhow::Result<()> {
    let (_, repository) = open(directory, options, &key(directory, options)?)?;
    let all = repository.list().await.map_err(|error| anyhow!("{error}"))?;
    terminal.show(&all, |all| {
        let rows: Vec<_> =
            all.iter().map(|one| vec![one.id.clone(), one.generation.clone(), one.created_at.to_string()]).collect();
        table(&["ID", "GENERATION", "CREATED"], &rows)
    })
}

async fn verify(directory: &Path, id: Option<&str>, options: &BackupOptions, terminal: Terminal) -> anyhow::Result<()> {
    let (_, repository) = open(directory, options, &key(directory, options)?)?;
    let stored = repository.find(id).await.map_err(|error| anyhow!("{error}"))?;
    let report = repository.verify(&stored).await.map_err(|error| anyhow!("{}: {error}", stored.id))?;
    terminal.show(&report, |report| {
        format!("{} is whole: {} rows and {} files, read and compared.", report.id, report.rows, report.files)
    })
}

/// Restores into a new directory, which then replaces the data directory. Until then, the data directory does not
/// change.
async fn restore(
    directory: &Path,
    id: Option<&str>,
    replace: bool,
    options: &BackupOptions,
    terminal: Terminal,
) -> anyhow::Result<()> {
    let _lock = data::lock_stopped(directory)?;
    let key = key(directory, options)?;
    let (_, repository) = open(directory, options, &key)?;
    let stored = repository.find(id).await.map_err(|error| anyhow!("{error}"))?;
    let staging = Staging::begin(directory, replace).map_err(|error| anyhow!("{error}"))?;
    let pending = repository.restore_files(&stored, &staging).await.map_err(|error| anyhow!("{error}"))?;
    // Read again: the backup may contain the configuration.
    let configuration = configuration::load(staging.path(), options.config.as_deref(), &options.set)?.configuration;
    let report: Report = pending.run(&installation(staging.path(), &configuration)).await.map_err(|error| anyhow!("{error}"))?;
    let restored_key = backup_key(staging.path());
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(restored_key.with_file_name(""))?;
    capsule_store::create_secret_file(&restored_key, &std::fs::read_to_string(&key)?)?;
    data::restrict(staging.path());
    let kept = staging.swap().map_err(|error| anyhow!("{error}"))?;
    terminal.show(&report, |report| {
        let kept = kept.as_ref().map_or_else(String::new, |kept| {
            format!("\nThe previous data directory is now {}. Remove it when you no longer need it.", kept.display())
        });
        format!(
            "Restored backup {}: {} rows and {} files. Start the server with `capsule server`.{kept}",
            report.id, report.rows, report.files
        )
    })
}
