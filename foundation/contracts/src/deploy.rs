//! Uploads, deployments, the instances that run of them, and their logs.

use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Count, Empty, Event, Page, Problem, StreamMessage, Timestamp, Uuid, message};

macro_rules! named {
    ($(#[$meta:meta])* $name:ident { $($variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $($variant),+ }

        impl $name {
            /// The name that the API and the databases use.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }

        impl FromStr for $name {
            type Err = Problem;
            fn from_str(text: &str) -> Result<Self, Problem> {
                match text {
                    $($text => Ok(Self::$variant),)+
                    _ => Err(Problem::bad_request(format!("`{text}` is not one of {}", [$($text),+].join(", ")))),
                }
            }
        }
    };
}

named! {
    /// How far a deployment has come, in the user's terms.
    Status {
        Pending = "pending",
        Building = "building",
        Deploying = "deploying",
        Running = "running",
        Failed = "failed",
        Cancelled = "cancelled",
        Superseded = "superseded",
    }
}

impl Status {
    /// Whether nothing more will happen to the deployment by itself, but being superseded.
    #[must_use]
    pub fn is_settled(self) -> bool {
        !matches!(self, Self::Pending | Self::Building | Self::Deploying)
    }
}

named! {
    /// The step a deployment is at. Written before it begins; a restart resumes from it.
    Phase {
        Queued = "queued",
        PullingSource = "pulling_source",
        Building = "building",
        CopyingFiles = "copying_files",
        CreatingSymlinks = "creating_symlinks",
        UpdatingRoutes = "updating_routes",
        HealthCheck = "health_check",
        Active = "active",
    }
}

/// One attempt to bring a release of a service into an environment.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Deployment {
    pub id: Uuid,
    pub organization_id: Uuid,
    pub project_id: Uuid,
    pub service_id: Uuid,
    pub service_name: String,
    pub environment_id: Uuid,
    pub environment_name: String,
    /// Counts the deployments of this service in this environment from 1.
    pub number: i64,
    pub status: Status,
    pub phase: Phase,
    /// What made it: `upload`, `redeploy` or `rollback`.
    pub trigger: String,
    /// What went wrong, when it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Where the service answers.
    pub url: String,
    /// Who asked for it.
    pub created_by: Uuid,
    pub created_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Timestamp>,
}

/// Announces an upload; the bytes follow on the stream row of the gateway.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct BeginUpload {
    pub service_id: Uuid,
    /// How many bytes will come, where that is known. No more are taken.
    #[serde(default)]
    pub bytes: Option<u64>,
}
message!(BeginUpload, command "deploy.begin_upload", Granted(ServiceManage) at Service(service_id) => Upload);

/// Says that an upload's bytes have all arrived.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CompleteUpload {
    pub id: Uuid,
    /// SHA-256 of the archive, in hexadecimal.
    pub digest: String,
    pub bytes: u64,
}
message!(CompleteUpload, command "deploy.complete_upload", Granted(ServiceManage) at Upload(id) => Upload);

/// A source archive: `tar`, `tar.gz` or `zip`.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Upload {
    pub id: Uuid,
    pub service_id: Uuid,
    /// SHA-256 of the archive, once it is complete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// How many bytes it has; until it is complete, how many may come.
    pub bytes: u64,
}

/// Deploys an upload of a service to an environment.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Deploy {
    pub id: Uuid,
    pub upload_id: Uuid,
    #[serde(default = "production")]
    pub environment: String,
}
message!(Deploy, command "deploy.deploy", GrantedDeploy at ServiceIn(id, environment) => Deployment);

/// Brings an earlier release of a service back, without building.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Rollback {
    pub id: Uuid,
    #[serde(default = "production")]
    pub environment: String,
    /// The number of the deployment to return to; the one before the present when absent.
    #[serde(default)]
    pub number: Option<i64>,
}
message!(Rollback, command "deploy.rollback", GrantedDeploy at ServiceIn(id, environment) => Deployment);

/// Builds and deploys the source of a deployment again, with today's configuration.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Redeploy {
    pub id: Uuid,
}
message!(Redeploy, command "deploy.redeploy", GrantedDeploy at Deployment(id) => Deployment);

/// Stops a deployment that is under way; what ran before keeps running.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CancelDeployment {
    pub id: Uuid,
}
message!(CancelDeployment, command "deploy.cancel_deployment", GrantedDeploy at Deployment(id) => Deployment);

/// Replaces a service's instances by new ones of the same release, without losing a request.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Restart {
    pub id: Uuid,
    #[serde(default = "production")]
    pub environment: String,
}
message!(Restart, command "deploy.restart", GrantedDeploy at ServiceIn(id, environment) => ServiceState);

/// Stops a service's instances. Its address answers that it is stopped.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Stop {
    pub id: Uuid,
    #[serde(default = "production")]
    pub environment: String,
}
message!(Stop, command "deploy.stop", GrantedDeploy at ServiceIn(id, environment) => ServiceState);

/// Starts a stopped service's instances.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Start {
    pub id: Uuid,
    #[serde(default = "production")]
    pub environment: String,
}
message!(Start, command "deploy.start", GrantedDeploy at ServiceIn(id, environment) => ServiceState);

/// Deletes what runs of a service in one environment, with its releases and its host. The service stays, and what
/// runs of it in other environments.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RemoveFromEnvironment {
    pub id: Uuid,
    /// The environment's name.
    pub environment: String,
}
message!(RemoveFromEnvironment, command "deploy.remove_from_environment", GrantedDeploy at ServiceIn(id, environment) => ServiceState);

/// The deployments of a service, newest first.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ListDeployments {
    pub service_id: Uuid,
    /// Only those of the environment of this name.
    #[serde(default)]
    pub environment: Option<String>,
    /// At most this many, 1 to 100.
    #[serde(default)]
    pub limit: Option<u32>,
    /// `next_cursor` of the page before.
    #[serde(default)]
    pub cursor: Option<String>,
}
message!(ListDeployments, query "deploy.list_deployments", Granted(ServiceView) at Service(service_id) => Page<Deployment>, |m, check| {
    check.that(m.limit.is_none_or(|n| (1..=100).contains(&n)), "limit", "must be 1 to 100");
});

/// One deployment.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct GetDeployment {
    pub id: Uuid,
}
message!(GetDeployment, query "deploy.get_deployment", Granted(ServiceView) at Deployment(id) => Deployment);

/// The phases a deployment went through.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ListDeploymentEvents {
    pub id: Uuid,
}
message!(ListDeploymentEvents, query "deploy.list_deployment_events", Granted(ServiceView) at Deployment(id) => Page<DeploymentEvent>);

/// A step of a deployment.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DeploymentEvent {
    pub at: Timestamp,
    pub status: Status,
    pub phase: Phase,
    pub message: String,
}

/// Runs detection over an upload and answers with the plan, building nothing.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct PlanUpload {
    pub upload_id: Uuid,
}
message!(PlanUpload, query "deploy.plan_upload", Granted(ServiceManage) at Upload(upload_id) => Plan);

/// A build plan as `capsule plan --json` prints it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(transparent)]
#[schema(value_type = Object)]
pub struct Plan(pub serde_json::Value);

/// What a service is doing in an environment.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct GetServiceState {
    pub id: Uuid,
    #[serde(default = "production")]
    pub environment: String,
}
message!(GetServiceState, query "deploy.get_service_state", Granted(ServiceView) at ServiceIn(id, environment) => ServiceState);

/// A service in an environment: what serves, and its instances.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ServiceState {
    pub service_id: Uuid,
    pub environment_name: String,
    pub url: String,
    /// `running`, `starting`, `crashed`, `stopped` or `not_deployed`.
    pub state: String,
    /// The deployment that serves.
    pub active: Option<Deployment>,
    pub instances: Vec<Instance>,
    /// What differs from what the repository asks for, such as the version of its runtime.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// A running copy of a process of a release.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Instance {
    /// Its name on the host that runs it.
    pub id: String,
    pub deployment_id: Uuid,
    /// The process type, such as `web` or `worker`.
    pub process: String,
    /// `starting`, `running`, `crashed`, `stopping` or `stopped`.
    pub state: String,
    /// The process id on the host, while it runs.
    pub pid: Option<u32>,
    /// How often it ended by itself and was started again.
    pub restarts: u32,
    pub started_at: Option<Timestamp>,
    /// Resident memory in bytes, where it can be told.
    pub memory_bytes: Option<u64>,
    /// How it ended last, if it did: `exited with status 1`, or `was stopped: it exceeded its disk limit of 64 MiB`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_exit: Option<String>,
    /// What it holds on disk, where that is limited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<DiskUsage>,
    /// What could not be enforced on this host.
    pub warnings: Vec<String>,
}

/// What an instance wrote to disk, and the most that it may hold there.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DiskUsage {
    pub bytes: u64,
    pub limit_bytes: u64,
    /// Files and folders.
    pub inodes: u64,
    pub limit_inodes: u64,
    /// `project quota`: the file system takes no more. `measured`: an instance that exceeds the limit is stopped.
    pub enforcement: String,
}

/// The build log of a deployment, from its beginning; follows until it is settled if asked to.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct StreamDeploymentLog {
    pub id: Uuid,
    #[serde(default)]
    pub follow: bool,
}
message!(StreamDeploymentLog, query "deploy.stream_deployment_log", Granted(LogsView) at Deployment(id) => LogLine);
impl StreamMessage for StreamDeploymentLog {}

/// The output of a service's instances; follows for as long as it is read if asked to.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct StreamServiceLog {
    pub id: Uuid,
    #[serde(default = "production")]
    pub environment: String,
    #[serde(default)]
    pub follow: bool,
    /// Begin with this many of the newest lines of each instance; all that are kept when absent.
    #[serde(default)]
    pub tail: Option<u32>,
}
message!(StreamServiceLog, query "deploy.stream_service_log", Granted(LogsView) at ServiceIn(id, environment) => LogLine);
impl StreamMessage for StreamServiceLog {}

/// A line that a build or an instance printed, or a step of a deployment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LogLine {
    pub at: Timestamp,
    /// `stdout`, `stderr`, or `capsule` for what the platform says itself.
    pub stream: String,
    /// Which process or instance said it.
    pub source: String,
    pub text: String,
}

/// A deployment changed its status or phase.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DeploymentChanged {
    pub deployment: Deployment,
}
impl Event for DeploymentChanged {
    const TYPE: &'static str = "deploy.deployment_changed";
    const VERSION: u16 = 1;
    fn subject(&self) -> Uuid {
        self.deployment.id
    }
    fn organization(&self) -> Option<Uuid> {
        Some(self.deployment.organization_id)
    }
}

/// Drops an upload whose bytes never arrived whole.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ForgetUpload {
    pub id: Uuid,
}
message!(ForgetUpload, command "deploy.forget_upload", Granted(ServiceManage) at Upload(id) => Empty);

/// The environments that a service runs in, or was told to: asked by the project service, which knows their kinds.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ListServiceEnvironments {
    pub service_id: Uuid,
}
message!(ListServiceEnvironments, query "deploy.list_service_environments", Internal => ServiceEnvironments);

/// Environments, by their ids.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ServiceEnvironments {
    pub environment_ids: Vec<Uuid>,
}

/// Refuses every further deployment of a service that is about to be deleted, unless it runs in an environment
/// that is not listed: who deletes it may not be allowed to deploy there.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CloseService {
    pub organization_id: Uuid,
    pub service_id: Uuid,
    pub environment_ids: Vec<Uuid>,
}
message!(CloseService, command "deploy.close_service", Internal => Empty);

/// How many services of an organization are deployed somewhere, those that are being removed among them.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CountPlacements {
    pub organization_id: Uuid,
}
message!(CountPlacements, query "deploy.count_placements", Internal => Count);

fn production() -> String {
    "production".into()
}
