//! Backups of the installation itself: made, looked through, restored.

use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use anyhow::{anyhow, bail};
use capsule_backup::{BackupKey, Kind, Report, Repository, Staging};

use crate::arguments::{BackupCommand, BackupPlace};
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
            BackupCommand::Create { full, place } => create(directory, *full, place, terminal).await,
            BackupCommand::List { place } => list(directory, place, terminal).await,
            BackupCommand::Verify { id, place } => verify(directory, id.as_deref(), place, terminal).await,
            BackupCommand::Restore { id, replace, place } => restore(directory, id.as_deref(), *replace, place, terminal).await,
        }
    })
}

/// The settings, and the place that they or the command line name.
fn open(directory: &Path, place: &BackupPlace, key: &Path) -> anyhow::Result<(Configuration, Repository)> {
    let configuration = configuration::load(directory, place.config.as_deref(), &place.set)?.configuration;
    let location = place.at.clone().unwrap_or_else(|| configuration.backup.location.clone());
    if location.is_empty() {
        bail!("no place is named: give --at, a directory or s3://bucket/prefix, or set backup.location");
    }
    let key = BackupKey::open(key).map_err(|error| anyhow!("the backup key: {error}"))?;
    Ok((configuration, Repository::open(&location, key).map_err(|error| anyhow!("{error}"))?))
}

/// The key that is given, or the installation's own, which must be there.
fn key(directory: &Path, place: &BackupPlace) -> anyhow::Result<std::path::PathBuf> {
    let key = place.key_file.clone().unwrap_or_else(|| backup_key(directory));
    if !key.is_file() {
        bail!("there is no backup key {}: name yours with --key-file", key.display());
    }
    Ok(key)
}

async fn create(directory: &Path, full: bool, place: &BackupPlace, terminal: Terminal) -> anyhow::Result<()> {
    if !directory.join("keys/master.key").is_file() {
        bail!("there is no installation in {}", directory.display());
    }
    let key = place.key_file.clone().unwrap_or_else(|| backup_key(directory));
    let (configuration, repository) = open(directory, place, &key)?;
    let kind = if full { Kind::Full } else { Kind::Incremental };
    let report = repository.create(&installation(directory, &configuration), kind).await.map_err(|error| anyhow!("{error}"))?;
    terminal.show(&report, |report| {
        format!(
            "Made the backup {}: {} rows, {} files; {} pieces of {} KiB were new.\nKeep a copy of its key elsewhere: {}",
            report.id,
            report.rows,
            report.files,
            report.pieces,
            report.bytes / 1024,
            key.display()
        )
    })
}

async fn list(directory: &Path, place: &BackupPlace, terminal: Terminal) -> anyhow::Result<()> {
    let (_, repository) = open(directory, place, &key(directory, place)?)?;
    let all = repository.list().await.map_err(|error| anyhow!("{error}"))?;
    terminal.show(&all, |all| {
        let rows: Vec<_> =
            all.iter().map(|one| vec![one.id.clone(), one.generation.clone(), one.created_at.to_string()]).collect();
        table(&["ID", "GENERATION", "MADE"], &rows)
    })
}

async fn verify(directory: &Path, id: Option<&str>, place: &BackupPlace, terminal: Terminal) -> anyhow::Result<()> {
    let (_, repository) = open(directory, place, &key(directory, place)?)?;
    let stored = repository.find(id).await.map_err(|error| anyhow!("{error}"))?;
    let report = repository.verify(&stored).await.map_err(|error| anyhow!("{}: {error}", stored.id))?;
    terminal.show(&report, |report| {
        format!("{} is whole: {} rows and {} files, read and compared.", report.id, report.rows, report.files)
    })
}

/// Everything is restored into a fresh directory, which then takes the place of the data directory: until then,
/// what is there stays as it is.
async fn restore(
    directory: &Path,
    id: Option<&str>,
    replace: bool,
    place: &BackupPlace,
    terminal: Terminal,
) -> anyhow::Result<()> {
    let _stopped = data::hold_stopped(directory)?;
    let key = key(directory, place)?;
    let (_, repository) = open(directory, place, &key)?;
    let stored = repository.find(id).await.map_err(|error| anyhow!("{error}"))?;
    let staging = Staging::begin(directory, replace).map_err(|error| anyhow!("{error}"))?;
    let pending = repository.restore_files(&stored, &staging).await.map_err(|error| anyhow!("{error}"))?;
    // Read again: the settings may be among what was restored.
    let configuration = configuration::load(staging.path(), place.config.as_deref(), &place.set)?.configuration;
    let report: Report =
        pending.run(&installation(staging.path(), &configuration)).await.map_err(|error| anyhow!("{error}"))?;
    let restored_key = backup_key(staging.path());
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(restored_key.with_file_name(""))?;
    capsule_store::create_secret_file(&restored_key, &std::fs::read_to_string(&key)?)?;
    data::restrict(staging.path());
    let kept = staging.swap().map_err(|error| anyhow!("{error}"))?;
    terminal.show(&report, |report| {
        let kept = kept.as_ref().map_or_else(String::new, |kept| {
            format!("\nWhat was there before is in {}; remove it when you do not need it any more.", kept.display())
        });
        format!(
            "Restored {}: {} rows and {} files. Start the server with `capsule server`.{kept}",
            report.id, report.rows, report.files
        )
    })
}
