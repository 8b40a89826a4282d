//! Quotas: how much of an installation one organization may use. The organization service owns them; the
//! services that hold what is counted keep a copy, and count within the transaction that uses it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Event, Page, Problem, Timestamp, Uuid, message};

/// What a quota counts. The names are those of the API, of the databases and of the settings `quotas.<name>`.
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
    /// Every quantity, in the order in which they are shown.
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

    /// Name, what is counted, and the limit where nobody has set another.
    const fn row(self) -> (&'static str, &'static str, u32) {
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

    /// The name that the API, the databases and the settings use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.row().0
    }

    /// What is counted, as a plural noun.
    #[must_use]
    pub const fn description(self) -> &'static str {
        self.row().1
    }

    /// The limit where neither the installation nor the organization has one.
    #[must_use]
    pub const fn default_limit(self) -> u32 {
        self.row().2
    }

    /// The lowest limit that makes sense: a project has one environment from the start, and builds that wait for
    /// no permit would wait for ever. Everything else may be 0, which allows nothing new.
    #[must_use]
    pub const fn lowest_limit(self) -> u32 {
        match self {
            Self::EnvironmentsPerProject | Self::ConcurrentBuilds => 1,
            _ => 0,
        }
    }

    /// What to do when the quota is used up.
    #[must_use]
    pub fn hint(self) -> String {
        let remedy = match self {
            Self::BuildsPerHour | Self::DeploymentsPerHour => "Try again when earlier ones are more than an hour old",
            Self::BuildsPerDay | Self::UploadMibPerDay => "Try again when earlier ones are more than 24 hours old",
            Self::Instances | Self::InstancesPerService | Self::MemoryMib => {
                "Stop services or remove process types that are not needed"
            }
            _ => "Delete what is not needed",
        };
        format!("{remedy}, or ask an administrator of the installation to raise the quota {}.", self.name())
    }

    /// The quantity of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|quantity| quantity.name() == name)
    }

    /// Why `limit` cannot be the limit of the quantity called `name`, if so.
    #[must_use]
    pub fn refusal(name: &str, limit: u32) -> Option<String> {
        match Self::named(name) {
            None => Some(format!("there is no quota of this name; there are {}", Self::ALL.map(Self::name).join(", "))),
            Some(quantity) if limit < quantity.lowest_limit() => Some(format!("must be at least {}", quantity.lowest_limit())),
            Some(_) => None,
        }
    }
}

/// The limits of an organization, or of an installation: by the names of their quantities. A name that is
/// missing has its default; one that is not known here, of a newer version, is kept and has no effect.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Quotas(pub BTreeMap<String, u32>);

impl Quotas {
    /// Every quantity with its default limit.
    #[must_use]
    pub fn defaults() -> Self {
        Self(Quantity::ALL.into_iter().map(|quantity| (quantity.name().to_owned(), quantity.default_limit())).collect())
    }

    /// These limits, with those of `own` in the place of theirs.
    #[must_use]
    pub fn with(&self, own: &Self) -> Self {
        let mut all = self.0.clone();
        all.extend(own.0.iter().map(|(name, limit)| (name.clone(), *limit)));
        Self(all)
    }

    /// The limit of a quantity.
    #[must_use]
    pub fn limit(&self, quantity: Quantity) -> i64 {
        self.0.get(quantity.name()).copied().unwrap_or(quantity.default_limit()).into()
    }

    /// Whether use may go from `before` to `after`: within the limit, or not above what it was. What exceeds a
    /// limit that was lowered goes on, and may shrink.
    ///
    /// # Errors
    /// [`Problem::quota_exceeded`] with what is used, the limit, and what to do.
    pub fn check(&self, quantity: Quantity, before: i64, after: i64) -> Result<(), Problem> {
        let limit = self.limit(quantity);
        if after <= limit || after <= before {
            return Ok(());
        }
        let detail = format!("{before} of {limit} {} are used; with this it would be {after}.", quantity.description());
        Err(Problem::quota_exceeded(detail).hint(quantity.hint()))
    }
}

/// A quota, and how much of it is used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Quota {
    pub name: String,
    /// What is counted.
    pub description: String,
    pub limit: i64,
    /// How much is used; null where there is no one number, or where its owner does not answer.
    pub used: Option<i64>,
    /// Whether the limit was set for this organization; otherwise it is the installation's.
    pub own: bool,
}

/// The quotas of an organization.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OrganizationQuotas {
    pub organization_id: Uuid,
    pub items: Vec<Quota>,
}

/// The quotas of an organization, and how much of them is used.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct GetQuotas {
    pub id: Uuid,
}
message!(GetQuotas, query "organization.get_quotas", Granted(OrgView) at Organization(id) => OrganizationQuotas);

/// The quotas of any organization, for administrators of the installation.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct InspectQuotas {
    pub id: Uuid,
}
message!(InspectQuotas, query "organization.inspect_quotas", PlatformAdmin => OrganizationQuotas);

/// Sets the quotas of an organization. What is not named has the installation's limit.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct SetQuotas {
    pub id: Uuid,
    /// Limits by the names of the quotas.
    pub quotas: BTreeMap<String, u32>,
}
message!(SetQuotas, command "organization.set_quotas", PlatformAdmin => OrganizationQuotas, |m, check| {
    for (name, limit) in &m.quotas {
        if let Some(why) = Quantity::refusal(name, *limit) {
            check.that(false, &format!("quotas.{name}"), &why);
        }
    }
});

/// An organization, as administrators of the installation see it.
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

/// Every organization of the installation, by their slugs.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct InspectOrganizations {
    /// Only the one with this slug.
    #[serde(default)]
    pub slug: Option<String>,
    /// `next_cursor` of the page before.
    #[serde(default)]
    pub cursor: Option<String>,
}
message!(InspectOrganizations, query "organization.inspect_organizations", PlatformAdmin => Page<InspectedOrganization>);

/// The limits of an organization, asked by a service that counts and does not know them.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ConfirmQuotas {
    pub organization_id: Uuid,
}
message!(ConfirmQuotas, query "organization.confirm_quotas", Internal => ConfirmedQuotas);

/// The limits of an organization, as their owner knows them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ConfirmedQuotas {
    pub organization_id: Uuid,
    /// The organization's own limits over those of the installation.
    pub quotas: Quotas,
    /// Rises with each change; a lower one is older.
    pub sequence: i64,
}

/// The limits of an organization were set.
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

/// How much an organization uses, by the names of the quantities that a service counts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct QuotaUse {
    pub used: BTreeMap<String, i64>,
}

/// How many projects, environments and services an organization has.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CountProjectUse {
    pub organization_id: Uuid,
}
message!(CountProjectUse, query "project.count_use", Internal => QuotaUse);

/// How many instances, builds and uploads an organization has.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct CountDeployUse {
    pub organization_id: Uuid,
}
message!(CountDeployUse, query "deploy.count_use", Internal => QuotaUse);

#[cfg(test)]
mod tests {
    use super::{Quantity, Quotas};

    #[test]
    fn use_may_grow_to_the_limit_and_shrink_above_it() {
        let quotas = Quotas([("projects".to_owned(), 3)].into());
        for (before, after, allowed) in [(0, 1, true), (2, 3, true), (3, 4, false), (9, 8, true), (9, 9, true), (9, 10, false)] {
            assert_eq!(quotas.check(Quantity::Projects, before, after).is_ok(), allowed, "{before} → {after}");
        }
        let problem = quotas.check(Quantity::Projects, 3, 4).expect_err("refused");
        assert_eq!((problem.code.as_str(), problem.status), ("quota_exceeded", 403));
        assert!(problem.to_string().contains("3 of 3 projects") && problem.to_string().contains("quota projects"), "{problem}");
    }

    #[test]
    fn an_organizations_own_limits_go_before_those_of_the_installation() {
        let installation = Quotas::defaults();
        let own = Quotas([("services".to_owned(), 7), ("of_a_newer_version".to_owned(), 1)].into());
        assert_eq!(installation.with(&own).limit(Quantity::Services), 7);
        assert_eq!(installation.with(&own).limit(Quantity::Projects), 100);
        assert_eq!(Quotas::default().limit(Quantity::Members), 200);
    }

    #[test]
    fn names_are_unique_and_lead_back() {
        for quantity in Quantity::ALL {
            assert_eq!(Quantity::named(quantity.name()), Some(quantity));
            assert_eq!(Quantity::refusal(quantity.name(), quantity.default_limit()), None);
        }
        assert!(Quantity::refusal("nonsense", 1).is_some_and(|why| why.contains("memory_mib")));
        assert!(Quantity::refusal("concurrent_builds", 0).is_some());
    }
}
