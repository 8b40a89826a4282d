//! Makes the plan of the unpacked source, and builds it in a sandbox.

use capsule_builder::Job;
use capsule_builder::planner::Source;
use capsule_buildplan::{Kind, Options, Plan, VersionMismatch};

use super::{Failure, io_failure};
use crate::deployments::{self, Row};
use crate::quotas::{self, Load};
use crate::service_environments::ServiceEnvironment;
use crate::{DeployService, disk, texts};
use capsule_store::Scope;

pub async fn run(
    service: &DeployService,
    scope: &impl Scope,
    service_environment: &ServiceEnvironment,
    row: &Row,
) -> Result<Row, Failure> {
    let source = service.work_directory(row.id).join("source");
    let log = service.build_log(row.id);
    let log_line = |text: &str| capsule_builder::log_line(&log, &texts::for_users(service, row, text));
    let tree = Source::Folder(source.clone());
    let planned = service.planner.plan(&tree, Options { containers: false }).await;
    let mut plan = planned.map_err(|error| Failure::Failed(format!("cannot make the plan: {error}")))?;
    let scratch = service.work_directory(row.id).join("versions");
    plan.mismatches = service.versions.mismatches(&service.builder, &plan, &scratch).await;
    let found =
        plan.detection.framework.as_deref().or(plan.detection.language.as_deref()).unwrap_or("no known framework or language");
    log_line(&format!("found {found}; {} process type(s)", plan.processes.len())).map_err(io_failure)?;
    for mismatch in &plan.mismatches {
        log_line(&format!("warning: {}", version_warning(mismatch))).map_err(io_failure)?;
    }
    for question in &plan.questions {
        log_line(&format!(
            "{} is unclear: {}. Add this to capsule.toml: {}",
            question.field,
            question.text,
            question.answer_with.replace('\n', " ")
        ))
        .map_err(io_failure)?;
    }
    if !matches!(plan.kind, Kind::Static) && plan.processes.is_empty() {
        let answer = plan.questions.first().map_or_else(
            || "Add the start command to capsule.toml: [processes] web = \"…\"".to_owned(),
            |question| format!("{}. Add this to capsule.toml: {}", question.text, question.answer_with.replace('\n', " ")),
        );
        return Err(Failure::Failed(format!("no start command found. {answer}")));
    }
    check_quotas(service, scope, service_environment, &plan).await?;
    let row = deployments::set_plan(service, scope, row, &plan).await?;
    disk::check_reserve(service).map_err(|problem| Failure::Failed(problem.to_string()))?;
    let environment = deployments::environment(service, &row)?;
    let job = Job {
        id: build_id(&row),
        directory: source,
        cache: service.options.data.join("cache").join(row.service_id.to_string()).join(row.environment_id.to_string()),
        log,
        uid: service_environment.uid.unsigned_abs(),
        masked: environment.values(),
        relaxations: service.relaxations(row.service_id),
        environment: environment.variables,
    };
    let built = service.builder.build(&plan, &job).await;
    bound_caches(service);
    built.map_err(|error| Failure::Failed(error.to_string()))?;
    Ok(row)
}

/// Fails before the build if the organization could not run its instances, which count when they are created.
async fn check_quotas(
    service: &DeployService,
    scope: &impl Scope,
    service_environment: &ServiceEnvironment,
    plan: &Plan,
) -> Result<(), Failure> {
    if plan.kind == Kind::Static {
        return Ok(());
    }
    let limits = quotas::limits_of(service, service_environment.organization_id).await?;
    let tx = service.store.begin().await?;
    let key = (service_environment.service_id, service_environment.environment_id);
    match quotas::admit_instances(&tx, scope, &limits, key, Load::of(plan)).await.map_err(Failure::from) {
        Ok(_) => Ok(()),
        Err(Failure::Failed(why)) => {
            Err(Failure::Failed(format!("{} process types are too many, one instance for each: {why}", plan.processes.len())))
        }
        Err(failure) => Err(failure),
    }
}

/// The warning that another version runs than the requested one.
pub fn version_warning(mismatch: &VersionMismatch) -> String {
    format!("{mismatch}. Capsule uses the toolchains of the server: install the version there, or request the one that runs.")
}

/// Deletes build caches above the limit, in the background.
fn bound_caches(service: &DeployService) {
    let (caches, keep) = (service.options.data.join("cache"), service.options.build_cache_bytes);
    tokio::task::spawn_blocking(move || {
        if let Err(error) = capsule_builder::evict(&caches, keep) {
            tracing::warn!(%error, "cannot reduce the build caches");
        }
    });
}

/// The name of a deployment's build steps on this host.
pub fn build_id(row: &Row) -> String {
    let id = row.id.simple().to_string();
    format!("b{}", &id[id.len() - 15..])
}
