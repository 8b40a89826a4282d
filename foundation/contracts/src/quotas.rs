//! Quotas: how much of an installation one organization may use. The organization service owns them. The services
//! that check quotas cache them, and count the usage in the transaction that increases it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Event, Page, Problem, Timestamp, Uuid, list, message};

/// What a quota limits. The API, the databases and the settings `quotas.<name>` use the same names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Quantity {
    Projects,
    EnvironmentsPerProject,
    Services,
    Instances,
    InstancesPerService,
    MemoryMib,
    ConcurrentBuilds,
    BuildsPerHour,
    BuildsPerDay,
    DeploymentsPerHour,
    UploadMibPerDay,
    VariablesPerEnvironment,
    VariableKibPerEnvironment,
    Members,
}

impl Quantity {
    /// Every quantity, in display order.
    pub const ALL: [Self; 14] = [
        Self::Projects,
        Self::EnvironmentsPerProject,
        Self::Services,
        Self::Instances,
        Self::InstancesPerService,
        Self::MemoryMib,
        Self::ConcurrentBuilds,
        Self::BuildsPerHour,
        Self::BuildsPerDay,
        Self::DeploymentsPerHour,
        Self::UploadMibPerDay,
        Self::VariablesPerEnvironment,
        Self::VariableKibPerEnvironment,
        Self::Members,
    ];

    /// Name, what is counted, and the default limit.
    const fn definition(self) -> (&'static str, &'static str, u32) {
        match self {
            Self::Projects => ("projects", "projects", 100),
            Self::EnvironmentsPerProject => ("environments_per_project", "environments of a project", 20),
            Self::Services => ("services", "services", 200),
            Self::Instances => ("instances", "instances", 50),
            Self::InstancesPerService => ("instances_per_service", "instances of a service in one environment", 20),
            Self::MemoryMib => ("memory_mib", "MiB of memory limits of all instances", 32_768),
            Self::ConcurrentBuilds => ("concurrent_builds", "builds at a time; more wait", 2),
            Self::BuildsPerHour => ("builds_per_hour", "builds within an hour", 120),
            Self::BuildsPerDay => ("builds_per_day", "builds within 24 hours", 1000),
            Self::DeploymentsPerHour => ("deployments_per_hour", "deployments, restarts and rollbacks within an hour", 600),
            Self::UploadMibPerDay => ("upload_mib_per_day", "MiB of uploads within 24 hours", 20_480),
            Self::VariablesPerEnvironment => ("variables_per_environment", "variables and secrets of an environment", 500),
            Self::VariableKibPerEnvironment => {
                ("variable_kib_per_environment", "KiB of variables and secrets of an environment", 256)
            }
            Self::Members => ("members", "members", 200),
        }
    }

    /// The name in the API, the databases and the settings.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.definition().0
    }

    /// What is counted, as a plural noun.
    #[must_use]
    pub const fn description(self) -> &'static str {
        self.definition().1
    }

    /// The limit if neither the organization nor the installation sets one.
    #[must_use]
    pub const fn default_limit(self) -> u32 {
        self.definition().2
    }

    /// The lowest limit that can be set. A new project has one environment, and with 0 concurrent builds no build
    /// would ever start. Other limits may be 0, which permits nothing new.
    #[must_use]
    pub const fn min_limit(self) -> u32 {
        match self {
            Self::EnvironmentsPerProject | Self::ConcurrentBuilds => 1,
            _ => 0,
        }
    }

    /// What to do when the quota is reached.
    #[must_use]
    pub fn hint(self) -> String {
        let remedy = match self {
            Self::BuildsPerHour | Self::DeploymentsPerHour => "Try again when earlier ones are more than an hour old",
            Self::BuildsPerDay | Self::UploadMibPerDay => "Try again when earlier ones are more than 24 hours old",
            Self::Instances | Self::InstancesPerService | Self::MemoryMib => {
                "Stop services or remove process types that you do not need"
            }
            _ => "Delete what you do not need",
        };
        format!("{remedy}, or ask an administrator of the installation to raise the quota {}.", self.name())
    }

    /// The quantity with this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|quantity| quantity.name() == name)
    }

    /// Why `limit` is not a valid limit of the quantity `name`; `None` if it is valid.
    #[must_use]
    pub fn limit_error(name: &str, limit: u32) -> Option<String> {
        match Self::from_name(name) {
            None => Some(format!("unknown quota; use one of {}", Self::ALL.map(Self::name).join(", "))),
            Some(quantity) if limit < quantity.min_limit() => Some(format!("must be at least {}", quantity.min_limit())),
            Some(_) => None,
        }
    }
}

/// The limits of an organization or an installation, by the names of their quantities. A missing name has its default
/// limit. An unknown name, from a newer version, is kept and ignored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Quotas(pub BTreeMap<String, u32>);

impl Quotas {
    /// Every quantity with its default limit.
    #[must_use]
    pub fn defaults() -> Self {
        Self(Quantity::ALL.into_iter().map(|quantity| (quantity.name().to_owned(), quantity.default_limit())).collect())
    }

    /// These limits, overridden by those of `own`.
    #[must_use]
    pub fn overridden_by(&self, own: &Self) -> Self {
        let mut all = self.0.clone();
        all.extend(own.0.iter().map(|(name, limit)| (name.clone(), *limit)));
        Self(all)
    }

    /// The limit of a quantity.
    #[must_use]
    pub fn limit(&self, quantity: Quantity) -> i64 {
        self.0.get(quantity.name()).copied().unwrap_or(quantity.default_limit()).into()
    }

    /// Checks that usage may change from `before` to `after`: up to the limit, or not above `before`. Existing usage
    /// above a lowered limit is permitted and may decrease.
    ///
    /// # Errors
    /// [`Problem::quota_exceeded`] with the usage, the limit and a hint.
    pub fn check(&self, quantity: Quantity, before: i64, after: i64) -> Result<(), Problem> {
        let limit = self.limit(quantity);
        if after <= limit || after <= before {
            return Ok(());
        }
        let detail = format!("Used: {before} of {limit} {}. This would need {after}.", quantity.description());
        Err(Problem::quota_exceeded(detail).hint(quantity.hint()))
    }
}

/// A quota and its usage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Quota {
    pub name: String,
    /// What is counted.
    pub description: String,
    pub limit: i64,
    /// The usage. Null if it is not a single number, or if the service that counts it is unavailable.
    pub used: Option<i64>,
    /// Whether the limit is set for this organization. Otherwise it is the installation's limit.
    pub own: bool,
}

/// The quotas of an organization.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OrganizationQuotas {
    pub organization_id: Uuid,
    pub items: Vec<Quota>,
}

/// Returns the quotas of an organization and their usage.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct GetQuotas {
    pub id: Uuid,
}
message!(GetQuotas, query "organization.get_quotas", Granted(OrgView) at Organization(id) => OrganizationQuotas);

/// Returns the quotas of any organization and their usage.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct InspectQuotas {
    pub id: Uuid,
}
message!(InspectQuotas, query "organization.inspect_quotas", PlatformAdmin => OrganizationQuotas);

/// Sets the quotas of an organization. A quota that is not given has the installation's limit.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct SetQuotas {
    pub id: Uuid,
    /// Limits by the names of the quotas.
    pub quotas: BTreeMap<String, u32>,
}
message!(SetQuotas, command "organization.set_quotas", PlatformAdmin => OrganizationQuotas, |m, check| {
    for (name, limit) in &m.quotas {
        if let Some(error) = Quantity::limit_error(name, *limit) {
            check.require(false, &format!("quotas.{name}"), &error);
        }
    }
});

/// An organization, for administrators of the installation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InspectedOrganization {
    pub id: Uuid,
    pub name: String,
    /// Unique in the installation.
    pub slug: String,
    pub personal: bool,
    pub created_at: Timestamp,
    pub members: i64,
}

list! {
    /// Lists the organizations of the installation, ordered by slug.
    InspectOrganizations by ["slug", "name", "created_at"] {
        /// Only the organization with this slug.
        slug: Option<String>,
        /// Only those whose name begins with this.
        name_prefix: Option<String>,
    }
}
message!(InspectOrganizations, query "organization.inspect_organizations", PlatformAdmin => Page<InspectedOrganization>, |m, check| check.list(m));

/// Returns the limits of an organization. Sent by a service whose cache has no valid entry for it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ConfirmQuotas {
    pub organization_id: Uuid,
}
message!(ConfirmQuotas, query "organization.confirm_quotas", Internal => ConfirmedQuotas);

/// The limits of an organization, from the organization service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ConfirmedQuotas {
    pub organization_id: Uuid,
    /// The installation's limits, overridden by the organization's.
    pub quotas: Quotas,
    /// Increases with each change.
    pub sequence: i64,
}

/// The limits of an organization were changed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct QuotasChanged {
    #[serde(flatten)]
    pub confirmed: ConfirmedQuotas,
}
impl Event for QuotasChanged {
    const TYPE: &'static str = "organization.quotas_changed";
    const VERSION: u16 = 1;
    fn subject(&self) -> Uuid {
        self.confirmed.organization_id
    }
}

/// An organization's usage of the quantities that a service counts, by their names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct QuotaUse {
    pub used: BTreeMap<String, i64>,
}

/// Counts the projects, environments and services of an organization.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CountProjectUse {
    pub organization_id: Uuid,
}
message!(CountProjectUse, query "project.count_use", Internal => QuotaUse);

/// Counts the instances, builds and uploads of an organization.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CountDeployUse {
    pub organization_id: Uuid,
}
message!(CountDeployUse, query "deploy.count_use", Internal => QuotaUse);

#[cfg(test)]
mod tests {
    use super::{Quantity, Quotas};

    #[test]
    fn usage_may_increase_up_to_the_limit_and_decrease_above_it() {
        let quotas = Quotas([("projects".to_owned(), 3)].into());
        for (before, after, allowed) in [(0, 1, true), (2, 3, true), (3, 4, false), (9, 8, true), (9, 9, true), (9, 10, false)] {
            assert_eq!(quotas.check(Quantity::Projects, before, after).is_ok(), allowed, "{before} → {after}");
        }
        let problem = quotas.check(Quantity::Projects, 3, 4).expect_err("refused");
        assert_eq!((problem.code.as_str(), problem.status), ("quota_exceeded", 403));
        assert!(problem.to_string().contains("3 of 3 projects") && problem.to_string().contains("quota projects"), "{problem}");
    }

    #[test]
    fn an_organizations_limits_override_those_of_the_installation() {
        let installation = Quotas::defaults();
        let own = Quotas([("services".to_owned(), 7), ("of_a_newer_version".to_owned(), 1)].into());
        assert_eq!(installation.overridden_by(&own).limit(Quantity::Services), 7);
        assert_eq!(installation.overridden_by(&own).limit(Quantity::Projects), 100);
        assert_eq!(Quotas::default().limit(Quantity::Members), 200);
    }

    #[test]
    fn every_quantity_is_found_by_its_name() {
        for quantity in Quantity::ALL {
            assert_eq!(Quantity::from_name(quantity.name()), Some(quantity));
            assert_eq!(Quantity::limit_error(quantity.name(), quantity.default_limit()), None);
        }
        assert!(Quantity::limit_error("nonsense", 1).is_some_and(|error| error.contains("memory_mib")));
        assert!(Quantity::limit_error("concurrent_builds", 0).is_some());
    }
}
