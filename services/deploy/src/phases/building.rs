//! Plans what was unpacked, and builds it in a sandbox.

use capsule_builder::Job;
use capsule_builder::planner::Source;
use capsule_buildplan::{Kind, Options, Plan, VersionMismatch};

use super::{Failure, host};
use crate::deployments::{self, Row};
use crate::placements::Placement;
use crate::quotas::{self, Load};
use crate::{Deploys, disk, texts};

pub async fn run(deploys: &Deploys, placement: &Placement, row: &Row) -> Result<Row, Failure> {
    let source = deploys.work_directory(row.id).join("source");
    let log = deploys.build_log(row.id);
    let say = |text: &str| capsule_builder::say(&log, &texts::for_users(deploys, row, text));
    let tree = Source::Folder(source.clone());
    let planned = deploys.planner.plan(&tree, Options { containers: false }).await;
    let mut plan = planned.map_err(|error| Failure::Failed(format!("the plan cannot be made: {error}")))?;
    let scratch = deploys.work_directory(row.id).join("versions");
    plan.mismatches = deploys.versions.mismatches(&deploys.builder, &plan, &scratch).await;
    let found = plan.detection.framework.as_deref().or(plan.detection.language.as_deref()).unwrap_or("nothing known");
    say(&format!("found {found}; {} process type(s)", plan.processes.len())).map_err(host)?;
    for mismatch in &plan.mismatches {
        say(&format!("warning: {}", version_warning(mismatch))).map_err(host)?;
    }
    for question in &plan.questions {
        say(&format!(
            "in doubt about {}: {}. This settles it in capsule.toml: {}",
            question.field,
            question.text,
            question.answer_with.replace('\n', " ")
        ))
        .map_err(host)?;
    }
    if !matches!(plan.kind, Kind::Static) && plan.processes.is_empty() {
        let answer = plan.questions.first().map_or_else(
            || "say how it is started in capsule.toml: [processes] web = \"…\"".to_owned(),
            |question| format!("{}; capsule.toml settles it: {}", question.text, question.answer_with.replace('\n', " ")),
        );
        return Err(Failure::Failed(format!("there is nothing to run: {answer}")));
    }
    check_quotas(deploys, placement, row, &plan).await?;
    let row = deployments::set_plan(deploys, row, &plan).await?;
    disk::check_reserve(deploys).map_err(|problem| Failure::Failed(problem.to_string()))?;
    let environment = deployments::environment(deploys, &row)?;
    let job = Job {
        id: build_id(&row),
        directory: source,
        cache: deploys.options.data.join("cache").join(row.service_id.to_string()).join(row.environment_id.to_string()),
        log,
        uid: placement.uid.unsigned_abs(),
        masked: environment.values(),
        relaxations: deploys.relaxations(row.service_id),
        environment: environment.variables,
    };
    let built = deploys.builder.build(&plan, &job).await;
    bound_caches(deploys);
    built.map_err(|error| Failure::Failed(error.to_string()))?;
    Ok(row)
}

/// What the organization could not run is not built. Its instances count once they are made.
async fn check_quotas(deploys: &Deploys, placement: &Placement, row: &Row, plan: &Plan) -> Result<(), Failure> {
    if plan.kind == Kind::Static {
        return Ok(());
    }
    let limits = quotas::of(deploys, placement.organization_id).await?;
    let tx = deploys.store.begin().await?;
    let place = (placement.service_id, placement.environment_id);
    match quotas::more_instances(&tx, &row.grant(), &limits, place, Load::of(plan)).await.map_err(Failure::from) {
        Ok(_) => Ok(()),
        Err(Failure::Failed(why)) => {
            Err(Failure::Failed(format!("{} process types are too many, one instance for each: {why}", plan.processes.len())))
        }
        Err(failure) => Err(failure),
    }
}

/// That another version runs than the one asked for, and what to do about it.
pub fn version_warning(mismatch: &VersionMismatch) -> String {
    format!("{mismatch}. Capsule uses the toolchains of the server: install the version there, or ask for the one that runs.")
}

/// Whatever became of a build, what it left behind is bounded; nobody waits for that.
fn bound_caches(deploys: &Deploys) {
    let (caches, keep) = (deploys.options.data.join("cache"), deploys.options.build_cache_bytes);
    tokio::task::spawn_blocking(move || {
        if let Err(error) = capsule_builder::evict(&caches, keep) {
            tracing::warn!(%error, "the caches of builds cannot be bounded");
        }
    });
}

/// Names a deployment's build steps on this host.
pub fn build_id(row: &Row) -> String {
    let id = row.id.simple().to_string();
    format!("b{}", &id[id.len() - 15..])
}
