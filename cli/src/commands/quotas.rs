//! `capsule quotas` and `capsule admin quotas`: limits and usage of organizations.

use std::collections::BTreeMap;

use anyhow::{Context, bail};
use capsule_contracts::quotas::{InspectedOrganization, OrganizationQuotas, Quantity, Quota};
use capsule_contracts::{Page, Uuid};
use serde_json::json;

use super::organizations;
use crate::arguments::QuotasCommand;
use crate::client::Client;
use crate::terminal::{Terminal, table};

/// `capsule status` warns from this usage on, in percent of the limit.
const WARNING_PERCENT: i64 = 80;

/// `capsule quotas`: of the organization with this slug, or of the personal one.
pub fn quotas(mut client: Client, slug: Option<&str>, terminal: Terminal) -> anyhow::Result<()> {
    let organization = match slug {
        Some(slug) => organizations::find(&mut client, slug, None)?,
        None => organizations::personal(&mut client)?.0,
    };
    let quotas: OrganizationQuotas = client.get(&format!("/organizations/{}/quotas", organization.id))?;
    terminal.show(&quotas, |quotas| format!("Quotas of {}\n\n{}", organization.slug, text(quotas)))
}

/// `capsule admin quotas`: of any organization.
pub fn administer(mut client: Client, command: &QuotasCommand, terminal: Terminal) -> anyhow::Result<()> {
    let (QuotasCommand::Show { organization: slug } | QuotasCommand::Set { organization: slug, .. }) = command;
    let path = format!("/admin/organizations/{}/quotas", find(&mut client, slug)?);
    let mut quotas: OrganizationQuotas = client.get(&path)?;
    if let QuotasCommand::Set { limits, .. } = command {
        let own = quotas.items.iter().filter(|quota| quota.own).map(|quota| (quota.name.clone(), quota.limit));
        let mut own: BTreeMap<String, i64> = own.collect();
        for (name, limit) in changes(limits)? {
            match limit {
                Some(limit) => own.insert(name, limit.into()),
                None => own.remove(&name),
            };
        }
        quotas = client.put(&path, &json!({"quotas": own}))?;
    }
    terminal.show(&quotas, |quotas| format!("Quotas of {slug}\n\n{}", text(quotas)))
}

/// The id of the organization with this slug or id, whether or not the user is a member.
fn find(client: &mut Client, slug: &str) -> anyhow::Result<Uuid> {
    if let Ok(id) = slug.parse::<Uuid>() {
        return Ok(id);
    }
    if !capsule_contracts::message::is_label(slug) {
        bail!("Invalid organization slug `{slug}`: use a-z, 0-9 and -.");
    }
    let page: Page<InspectedOrganization> = client.get(&format!("/admin/organizations?slug={slug}"))?;
    page.items.first().map(|organization| organization.id).with_context(|| format!("There is no organization {slug}."))
}

/// `name=limit`, or `name=default` for the installation's.
fn changes(texts: &[(String, String)]) -> anyhow::Result<Vec<(String, Option<u32>)>> {
    let change = |(name, text): &(String, String)| {
        let limit = match text.as_str() {
            "default" => None,
            text => Some(text.parse().with_context(|| format!("{name}: `{text}` is neither a whole number nor `default`."))?),
        };
        // Without a limit, only the name can be invalid.
        match Quantity::limit_error(name, limit.unwrap_or(u32::MAX)) {
            Some(why) => bail!("{name}: {why}."),
            None => Ok((name.clone(), limit)),
        }
    };
    texts.iter().map(change).collect()
}

fn text(quotas: &OrganizationQuotas) -> String {
    let row = |quota: &Quota| {
        let used = quota.used.map_or_else(|| "-".to_owned(), |used| used.to_string());
        let of = if quota.own { "this organization" } else { "default" };
        vec![quota.name.clone(), used, quota.limit.to_string(), of.to_owned(), quota.description.clone()]
    };
    table(&["QUOTA", "USED", "LIMIT", "SOURCE", ""], &quotas.items.iter().map(row).collect::<Vec<_>>())
}

/// A line for each quota that is nearly used up. `capsule status` shows them.
pub fn nearly_used_up(quotas: &[Quota]) -> Vec<String> {
    let near = |quota: &&Quota| quota.used.is_some_and(|used| used > 0 && used * 100 >= quota.limit * WARNING_PERCENT);
    let line = |quota: &Quota| {
        format!("quota: {} of {} {} used ({})", quota.used.unwrap_or_default(), quota.limit, quota.description, quota.name)
    };
    // Using all concurrent builds is normal.
    let items = quotas.iter().filter(|quota| quota.name != Quantity::ConcurrentBuilds.name());
    items.filter(near).map(line).collect()
}

#[cfg(test)]
mod tests {
    use capsule_contracts::quotas::Quota;

    use super::{changes, nearly_used_up};

    #[test]
    fn limits_are_numbers_or_the_default() {
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let read = changes(&[pair("projects", "3"), pair("services", "default")]).expect("fine");
        assert_eq!(read, [("projects".to_owned(), Some(3)), ("services".to_owned(), None)]);
        for wrong in [pair("projects", "many"), pair("projects", "-1"), pair("nonsense", "1"), pair("concurrent_builds", "0")] {
            assert!(changes(&[wrong]).is_err());
        }
    }

    #[test]
    fn only_what_is_nearly_used_up_is_mentioned() {
        let quota = |name: &str, used, limit| Quota { name: name.into(), description: name.into(), limit, used, own: false };
        let items = [
            quota("projects", Some(79), 100),
            quota("services", Some(80), 100),
            quota("members", Some(3), 0),
            quota("instances", None, 10),
            quota("builds_per_day", Some(0), 0),
            quota("concurrent_builds", Some(2), 2),
        ];
        let lines = nearly_used_up(&items);
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(lines[0].contains("80 of 100 services") && lines[1].contains("3 of 0 members"), "{lines:?}");
    }
}
