//! Scheduled backups: incremental ones, and a full one every day.

use std::path::Path;
use std::time::Duration;

use capsule_backup::{BackupError, BackupKey, Installation, Kind, Repository};
use capsule_contracts::Timestamp;

use super::configuration::{Backup, Configuration};

/// How often the schedule is checked.
const CHECK_PERIOD: Duration = Duration::from_secs(60);
const DAY_SECONDS: i64 = 24 * 3600;

/// The installation to back up or restore into.
pub fn installation(directory: &Path, configuration: &Configuration) -> Installation {
    let databases = super::databases(directory, configuration);
    Installation { data: directory.into(), databases, services: super::DATABASES.to_vec() }
}

/// Creates backups until the process ends. The repository has the time of the last backup, and a lock file lets only one
/// process of the host create the next.
pub async fn run(settings: Backup, key: &Path, installation: Installation) {
    loop {
        match create_if_due(&settings, key, &installation).await {
            Ok(Some(report)) => {
                tracing::info!(
                    id = report.id,
                    rows = report.rows,
                    files = report.files,
                    bytes = report.bytes,
                    "created a backup"
                );
                metrics::counter!("capsule_backups_total", "result" => "made").increment(1);
                metrics::gauge!("capsule_backup_last_success_timestamp_seconds").set(Timestamp::now().as_seconds() as f64);
            }
            Ok(None) => {}
            Err(error) => {
                tracing::error!(%error, "cannot create a backup; retrying");
                metrics::counter!("capsule_backups_total", "result" => "failed").increment(1);
            }
        }
        tokio::time::sleep(CHECK_PERIOD).await;
    }
}

async fn create_if_due(
    settings: &Backup,
    key: &Path,
    installation: &Installation,
) -> Result<Option<capsule_backup::Report>, BackupError> {
    let path = installation.data.join("run/backup.lock");
    let lock = std::fs::File::create(&path).map_err(|error| BackupError(format!("{}: {error}", path.display())))?;
    if lock.try_lock().is_err() {
        return Ok(None);
    }
    let repository = Repository::open(&settings.location, BackupKey::open(key)?)?;
    let all = repository.list().await?;
    let now = Timestamp::now().as_seconds();
    let age =
        |stored: Option<&capsule_backup::StoredBackup>| stored.map_or(i64::MAX, |stored| now - stored.created_at.as_seconds());
    if age(all.last()) < i64::from(settings.minutes) * 60 {
        return Ok(None);
    }
    let full = age(all.iter().rfind(|stored| stored.id == stored.generation)) >= DAY_SECONDS;
    let report = repository.create(installation, if full { Kind::Full } else { Kind::Incremental }).await?;
    repository.prune(settings.keep_days as usize).await?;
    Ok(Some(report))
}
