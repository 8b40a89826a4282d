//! Uploads, deployments, instances and their logs.

use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Count, Empty, Event, Page, Problem, StreamMessage, Timestamp, Uuid, list, message};

macro_rules! string_enum {
    ($(#[$meta:meta])* $name:ident { $($variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $($variant),+ }

        impl $name {
            /// The name in the API and the databases.
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
                    _ => Err(Problem::bad_request(format!("`{text}` is not valid; use one of {}", [$($text),+].join(", ")))),
                }
            }
        }
    };
}

string_enum! {
    /// The status of a deployment.
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
    /// Whether the deployment has ended. It can still become superseded.
    #[must_use]
    pub fn is_settled(self) -> bool {
        !matches!(self, Self::Pending | Self::Building | Self::Deploying)
    }
}

string_enum! {
    /// The current phase of a deployment. It is stored before the phase starts, so that a restarted server resumes
    /// there.
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

/// One attempt to make a release of a service serve in an environment.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Deployment {
    pub id: Uuid,
    pub organization_id: Uuid,
    pub project_id: Uuid,
    pub service_id: Uuid,
    pub service_name: String,
    pub environment_id: Uuid,
    pub environment_name: String,
    /// The deployment's number among those of this service in this environment, from 1.
    pub number: i64,
    pub status: Status,
    pub phase: Phase,
    /// What started it: `upload`, `redeploy` or `rollback`.
    pub trigger: String,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The service's URL.
    pub url: String,
    /// The user who started it.
    pub created_by: Uuid,
    pub created_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Timestamp>,
}

/// Starts an upload. The gateway then receives its bytes.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct BeginUpload {
    pub service_id: Uuid,
    /// The archive's size in bytes, where it is known. More bytes are refused.
    #[serde(default)]
    pub bytes: Option<u64>,
}
message!(BeginUpload, command "deploy.begin_upload", Granted(ServiceManage) at Service(service_id) => Upload);

/// Completes an upload once all its bytes are stored.
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
    /// The archive's size in bytes. Until the upload is complete, the largest permitted size.
    pub bytes: u64,
}

/// Builds an upload of a service and deploys it to an environment.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Deploy {
    pub id: Uuid,
    pub upload_id: Uuid,
    #[serde(default = "production")]
    pub environment: String,
}
message!(Deploy, command "deploy.deploy", GrantedDeploy at ServiceIn(id, environment) => Deployment);

/// Deploys an earlier release of a service again, without building.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Rollback {
    pub id: Uuid,
    #[serde(default = "production")]
    pub environment: String,
    /// The number of the deployment to return to. Default: the one before the active deployment.
    #[serde(default)]
    pub number: Option<i64>,
}
message!(Rollback, command "deploy.rollback", GrantedDeploy at ServiceIn(id, environment) => Deployment);

/// Builds and deploys the source of a deployment again, with the current configuration.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Redeploy {
    pub id: Uuid,
}
message!(Redeploy, command "deploy.redeploy", GrantedDeploy at Deployment(id) => Deployment);

/// Cancels a deployment in progress. The active deployment keeps running.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CancelDeployment {
    pub id: Uuid,
}
message!(CancelDeployment, command "deploy.cancel_deployment", GrantedDeploy at Deployment(id) => Deployment);

/// Replaces a service's instances by new ones of the same release, without downtime.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Restart {
    pub id: Uuid,
    #[serde(default = "production")]
    pub environment: String,
}
message!(Restart, command "deploy.restart", GrantedDeploy at ServiceIn(id, environment) => ServiceState);

/// Stops a service's instances. Requests to its URL get a page that says the service is stopped.
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

/// Removes a service from one environment: deletes its instances, releases and host name there. The service and its
/// other environments stay.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct RemoveFromEnvironment {
    pub id: Uuid,
    /// The environment's name.
    pub environment: String,
}
message!(RemoveFromEnvironment, command "deploy.remove_from_environment", GrantedDeploy at ServiceIn(id, environment) => ServiceState);

list! {
    /// Lists the deployments of a service, newest first.
    ListDeployments by ["-created_at"] {
        service_id: Uuid,
        /// Only deployments in the environment with this name.
        environment: Option<String>,
        /// Only deployments with this status.
        status: Option<Status>,
    }
}
message!(ListDeployments, query "deploy.list_deployments", Granted(ServiceView) at Service(service_id) => Page<Deployment>, |m, check| check.list(m));

/// Returns a deployment.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct GetDeployment {
    pub id: Uuid,
}
message!(GetDeployment, query "deploy.get_deployment", Granted(ServiceView) at Deployment(id) => Deployment);

list! {
    /// Lists the phases that a deployment has gone through.
    ListDeploymentEvents by ["at"] {
        id: Uuid,
    }
}
message!(ListDeploymentEvents, query "deploy.list_deployment_events", Granted(ServiceView) at Deployment(id) => Page<DeploymentEvent>, |m, check| check.list(m));

/// A change of a deployment's status or phase.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DeploymentEvent {
    pub at: Timestamp,
    pub status: Status,
    pub phase: Phase,
    pub message: String,
}

/// Detects the app in an upload and returns its build plan, without building.
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

/// Returns the state of a service in an environment.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct GetServiceState {
    pub id: Uuid,
    #[serde(default = "production")]
    pub environment: String,
}
message!(GetServiceState, query "deploy.get_service_state", Granted(ServiceView) at ServiceIn(id, environment) => ServiceState);

/// The state of a service in an environment: its active deployment and its instances.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ServiceState {
    pub service_id: Uuid,
    pub environment_name: String,
    pub url: String,
    /// `running`, `starting`, `crashed`, `stopped` or `not_deployed`.
    pub state: String,
    /// The deployment that serves requests.
    pub active: Option<Deployment>,
    pub instances: Vec<Instance>,
    /// Differences from what the repository specifies, such as the version of its runtime.
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
    /// How often it was started again after it had exited.
    pub restarts: u32,
    pub started_at: Option<Timestamp>,
    /// Resident memory in bytes, where it can be measured.
    pub memory_bytes: Option<u64>,
    /// How it last ended: for example `exited with status 1`, or `was stopped: it exceeded its disk limit of 64 MiB`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_exit: Option<String>,
    /// Its disk usage, where that is limited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<DiskUsage>,
    /// Limits that this host cannot enforce.
    pub warnings: Vec<String>,
}

/// An instance's disk usage, and its limits.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DiskUsage {
    pub bytes: u64,
    pub limit_bytes: u64,
    /// Files and folders.
    pub inodes: u64,
    pub limit_inodes: u64,
    /// `project quota`: the file system refuses writes above the limit. `measured`: an instance that exceeds the
    /// limit is stopped.
    pub enforcement: String,
}

/// Streams the build log of a deployment from its beginning. With `follow`, the stream continues until the deployment
/// ends.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct StreamDeploymentLog {
    pub id: Uuid,
    #[serde(default)]
    pub follow: bool,
}
message!(StreamDeploymentLog, query "deploy.stream_deployment_log", Granted(LogsView) at Deployment(id) => LogLine);
impl StreamMessage for StreamDeploymentLog {}

/// Streams the output of a service's instances. With `follow`, the stream continues until the client closes it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct StreamServiceLog {
    pub id: Uuid,
    #[serde(default = "production")]
    pub environment: String,
    #[serde(default)]
    pub follow: bool,
    /// Start with this many of the newest lines of each instance. Default: all stored lines.
    #[serde(default)]
    pub tail: Option<u32>,
}
message!(StreamServiceLog, query "deploy.stream_service_log", Granted(LogsView) at ServiceIn(id, environment) => LogLine);
impl StreamMessage for StreamServiceLog {}

/// A line that a build or an instance printed, or a step of a deployment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LogLine {
    pub at: Timestamp,
    /// `stdout`, `stderr`, or `capsule` for messages of the platform.
    pub stream: String,
    /// The process or instance that printed it.
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

/// Deletes an upload that was not completed.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DiscardUpload {
    pub id: Uuid,
}
message!(DiscardUpload, command "deploy.forget_upload", Granted(ServiceManage) at Upload(id) => Empty);

/// Lists the environments that a service is deployed to. Sent by the project service, which has their kinds.
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

/// Closes a service for deployments before it is deleted. Refused if the service is deployed to an environment that
/// is not listed: the caller may not deploy there.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CloseService {
    pub organization_id: Uuid,
    pub service_id: Uuid,
    pub environment_ids: Vec<Uuid>,
}
message!(CloseService, command "deploy.close_service", Internal => Empty);

/// Counts an organization's services in environments, including those being removed.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CountServiceEnvironments {
    pub organization_id: Uuid,
}
message!(CountServiceEnvironments, query "deploy.count_placements", Internal => Count);

fn production() -> String {
    "production".into()
}
