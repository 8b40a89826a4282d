//! `capsule org`: organizations, their members, and invitations.

use std::time::Duration;

use anyhow::{anyhow, bail};
use capsule_contracts::organization::{AddedMember, Invitation, Member, Organization};
use capsule_contracts::{Empty, Role};
use serde_json::json;

use super::account::confirmed;
use crate::arguments::OrgCommand;
use crate::client::Client;
use crate::nearest::did_you_mean;
use crate::terminal::{Failure, Terminal, confirm, table};

pub fn run(mut client: Client, command: OrgCommand, terminal: Terminal) -> anyhow::Result<()> {
    if !matches!(command, OrgCommand::List | OrgCommand::Members { .. }) {
        terminal.note(&format!("Server {}", client.name()));
    }
    match command {
        OrgCommand::List => list(&mut client, terminal),
        OrgCommand::Create { name, slug } => {
            let created: Organization = client.post("/organizations", &json!({"name": name, "slug": slug}))?;
            terminal.show(&created, |created| format!("Created the organization {} ({}).", created.name, created.slug))
        }
        OrgCommand::Members { organization } => {
            let organization = find(&mut client, &organization, None)?;
            let members = members(&mut client, &organization)?;
            terminal.show(&members, |members| {
                let rows: Vec<_> = members
                    .iter()
                    .map(|member| {
                        let state = if member.pending { "pending" } else { "member" };
                        vec![member.email.clone(), member.name.clone(), member.role.name().into(), state.into()]
                    })
                    .collect();
                table(&["EMAIL", "NAME", "ROLE", "STATE"], &rows)
            })
        }
        OrgCommand::Add { organization, email, role } => add(&mut client, &organization, &email, role, terminal),
        OrgCommand::Role { organization, email, role } => {
            let organization = find(&mut client, &organization, None)?;
            let member = member(&mut client, &organization, &email)?;
            let path = format!("/organizations/{}/members/{}/role", organization.id, member.user_id);
            let _: Empty = client.patch(&path, &json!({"role": role}))?;
            let changed = Member { role, ..member };
            terminal.show(&changed, |changed| format!("{} is now {} in {}.", changed.email, role.name(), organization.slug))
        }
        OrgCommand::Remove { organization, email } => {
            let organization = find(&mut client, &organization, None)?;
            let member = member(&mut client, &organization, &email)?;
            let _: Empty = client.delete(&format!("/organizations/{}/members/{}", organization.id, member.user_id))?;
            terminal.show(&member, |member| format!("Removed {} from {}.", member.email, organization.slug))
        }
        OrgCommand::Accept { organization } => {
            let invitation = invitation(&mut client, &organization)?;
            let joined: Organization = client.post(&format!("/invitations/{}/accept", invitation.id), &json!({}))?;
            terminal.show(&joined, |joined| {
                format!(
                    "You are now {} in {}. Deploy there with --organization {}.",
                    joined.role.name(),
                    joined.name,
                    joined.slug
                )
            })
        }
        OrgCommand::Decline { organization } => {
            let invitation = invitation(&mut client, &organization)?;
            let _: Empty = client.post(&format!("/invitations/{}/reject", invitation.id), &json!({}))?;
            terminal.show(&invitation, |invitation| format!("Declined the invitation to {}.", invitation.organization_name))
        }
        OrgCommand::Leave { organization, yes } => {
            let organization = find(&mut client, &organization, None)?;
            if !confirm(&format!("Leave {}?", organization.slug), yes)? {
                bail!("Nothing was changed.");
            }
            let _: Empty = client.post(&format!("/organizations/{}/leave", organization.id), &json!({}))?;
            terminal.show(&organization, |organization| format!("You left {}.", organization.slug))
        }
        OrgCommand::Delete { organization, yes } => {
            let organization = find(&mut client, &organization, None)?;
            let question = format!("Delete {} with all its projects and running services?", organization.slug);
            if !confirm(&question, yes)? {
                bail!("Nothing was changed.");
            }
            let path = format!("/organizations/{}", organization.id);
            let _: Empty = confirmed(&mut client, |client, password| client.delete_with(&path, &json!({"password": password})))?;
            terminal.show(&organization, |organization| format!("Deleting {}.", organization.slug))
        }
    }
}

fn list(client: &mut Client, terminal: Terminal) -> anyhow::Result<()> {
    let organizations = client.list::<Organization>("/organizations")?;
    let invitations = client.list::<Invitation>("/invitations")?;
    terminal.show(&json!({"organizations": organizations, "invitations": invitations}), |_| {
        let own = organizations.iter().map(|organization| {
            let state = if organization.personal { "member, personal" } else { "member" };
            vec![organization.slug.clone(), organization.name.clone(), organization.role.name().into(), state.into()]
        });
        let pending = invitations.iter().map(|invitation| {
            let by = invitation.invited_by.as_deref().unwrap_or("a deleted account");
            vec![
                invitation.organization_slug.clone(),
                invitation.organization_name.clone(),
                invitation.role.name().into(),
                format!("pending, invited by {by}"),
            ]
        });
        let text = table(&["SLUG", "NAME", "ROLE", "STATE"], &own.chain(pending).collect::<Vec<_>>());
        match invitations.first() {
            Some(first) => format!("{text}\n\nAccept an invitation with: capsule org accept {}", first.organization_slug),
            None => text,
        }
    })
}

fn add(client: &mut Client, organization: &str, email: &str, role: Role, terminal: Terminal) -> anyhow::Result<()> {
    let organization = find(client, organization, None)?;
    let path = format!("/organizations/{}/members", organization.id);
    let added: AddedMember = client.post(&path, &json!({"email": email, "role": role}))?;
    // The secret is in the fragment: browsers do not send it, and servers do not log it.
    let link = added.registration_token.as_ref().map(|token| format!("{}/register#{token}", client.name()));
    let mut shown = serde_json::to_value(&added)?;
    if let Some(link) = &link {
        shown["registration_link"] = json!(link);
    }
    terminal.show(&shown, |_| {
        let invited = format!("Invited {} to {} as {}.", added.email, organization.slug, role.name());
        let accept = format!("They become a member with: capsule org accept {}", organization.slug);
        match link {
            None => format!("{invited}\n{accept}"),
            Some(link) => format!(
                "{invited}\nThe address has no account here. Send them this registration link. It is shown only now, works once, and \
                 expires at {}:\n\n  {link}\n\nThey run: capsule register\n{accept}",
                added.expires_at
            ),
        }
    })
}

/// The organization with this slug or id. `source` says what named it, for the message, such as `--organization names`.
///
/// # Errors
/// `not_a_member`, with the organizations of the user.
pub fn find(client: &mut Client, slug: &str, source: Option<&str>) -> anyhow::Result<Organization> {
    let all = client.list::<Organization>("/organizations")?;
    let position = all.iter().position(|organization| organization.slug == slug);
    let position = position.or_else(|| all.iter().position(|organization| organization.id.to_string() == slug));
    if let Some(position) = position {
        return Ok(all[position].clone());
    }
    let known: Vec<&str> = all.iter().map(|organization| organization.slug.as_str()).collect();
    let source = source.map_or_else(String::new, |source| format!(", which {source}"));
    let near = did_you_mean(slug, known.iter().copied());
    Err(Failure::new("not_a_member", format!("You are not a member of the organization {slug}{source}.{near}"))
        .hint(format!("Your organizations: {}. To join {slug}, ask one of its owners to add you.", known.join(", ")))
        .into())
}

/// The personal organization of the user, and how many organizations they are a member of.
///
/// # Errors
/// `no_organization`, if there is none after five seconds: an event creates it right after registration.
pub fn personal(client: &mut Client) -> anyhow::Result<(Organization, usize)> {
    for _ in 0..50 {
        let all = client.list::<Organization>("/organizations")?;
        let count = all.len();
        if let Some(personal) = all.into_iter().find(|organization| organization.personal) {
            return Ok((personal, count));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Err(Failure::new("no_organization", "You have no personal organization.")
        .hint("Choose an organization with --organization. `capsule org list` lists yours.")
        .into())
}

fn invitation(client: &mut Client, slug: &str) -> anyhow::Result<Invitation> {
    let all = client.list::<Invitation>("/invitations")?;
    all.into_iter()
        .find(|invitation| invitation.organization_slug == slug || invitation.id.to_string() == slug)
        .ok_or_else(|| anyhow!("You have no invitation to {slug}. `capsule org list` lists your invitations."))
}

fn members(client: &mut Client, organization: &Organization) -> anyhow::Result<Vec<Member>> {
    client.list::<Member>(&format!("/organizations/{}/members", organization.id))
}

fn member(client: &mut Client, organization: &Organization, email: &str) -> anyhow::Result<Member> {
    let wanted = email.trim().to_lowercase();
    members(client, organization)?
        .into_iter()
        .find(|member| member.email == wanted)
        .ok_or_else(|| anyhow!("{email} is not a member of {0}. `capsule org members {0}` lists the members.", organization.slug))
}
