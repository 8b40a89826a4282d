//! `capsule destroy`: deletes a service in one environment, or in all of them.

use anyhow::bail;
use capsule_contracts::Empty;
use capsule_contracts::deploy::ServiceState;
use serde_json::json;

use super::service::{self, ServiceEnvironment, announce};
use crate::arguments::Destroy;
use crate::client::Client;
use crate::folder;
use crate::terminal::{Failure, Terminal, can_prompt, confirm, confirm_by_name, counted, table};

pub fn destroy(mut client: Client, arguments: &Destroy, terminal: Terminal) -> anyhow::Result<()> {
    let wanted = folder::resolve(&arguments.at)?;
    if wanted.is_environment_named && !arguments.all_environments {
        let found = service::find(&mut client, &wanted, terminal)?;
        return one_environment(&mut client, &found, arguments.yes, terminal);
    }
    let found = service::find_in_any(&mut client, &wanted, terminal)?;
    whole_service(&mut client, &found, arguments, terminal)
}

fn one_environment(client: &mut Client, found: &ServiceEnvironment, yes: bool, terminal: Terminal) -> anyhow::Result<()> {
    let (service, environment) = (&found.service.name, &found.environment);
    let state = found.state(client)?;
    if state.state == "not_deployed" {
        let text = format!("{service} is not deployed to {environment}.");
        return Err(Failure::new("not_deployed", text).hint("Choose another environment with -e NAME.").into());
    }
    found.announce(client, terminal);
    let question = format!("Delete {service} in {environment} ({}, {})?", state.url, instances(&state));
    if !confirm(&question, yes)? {
        bail!("Nothing was deleted.");
    }
    let _: ServiceState = client.delete(&format!("/services/{}/environments/{environment}", found.service.id))?;
    terminal.show(&json!({"deleted": found.service.id, "environment": environment}), |_| {
        format!("Deleting {service} in {environment}. Its other environments do not change.")
    })
}

fn whole_service(client: &mut Client, found: &ServiceEnvironment, arguments: &Destroy, terminal: Terminal) -> anyhow::Result<()> {
    let name = &found.service.name;
    let mut states = Vec::new();
    for environment in &found.environments {
        let state = found.state_in(client, &environment.name)?;
        if state.state != "not_deployed" {
            states.push(state);
        }
    }
    announce(client, &found.organization, &found.project.slug, name, None, terminal);
    terminal.note(&summary(name, &states));
    if !(arguments.all_environments && arguments.yes) {
        if !can_prompt() {
            return Err(Failure::new("not_confirmed", format!("This deletes {name} in every environment."))
                .hint("Use -e NAME to delete it in one environment, or --all-environments --yes to delete it in all.")
                .into());
        }
        if !confirm_by_name(&format!("Type {name} to delete it in all environments"), name)? {
            bail!("The name does not match. Nothing was deleted.");
        }
    }
    let _: Empty = client.delete(&format!("/services/{}", found.service.id))?;
    let environments: Vec<&str> = states.iter().map(|state| state.environment_name.as_str()).collect();
    terminal.show(&json!({"deleted": found.service.id, "environments": environments}), |_| format!("Deleted {name}."))
}

/// What is deleted with a service.
fn summary(name: &str, states: &[ServiceState]) -> String {
    if states.is_empty() {
        return format!("{name} is not deployed in any environment.");
    }
    let rows: Vec<_> = states
        .iter()
        .map(|state| vec![state.environment_name.clone(), state.state.clone(), state.url.clone(), instances(state)])
        .collect();
    format!("Deleted with {name}:\n{}", table(&["ENVIRONMENT", "STATE", "URL", "INSTANCES"], &rows))
}

fn instances(state: &ServiceState) -> String {
    match state.instances.len() {
        0 => "no instances".into(),
        count => counted(count, "instance"),
    }
}

#[cfg(test)]
mod tests {
    use super::summary;
    use capsule_contracts::Uuid;
    use capsule_contracts::deploy::ServiceState;

    #[test]
    fn deployments_that_are_deleted_are_listed_by_environment_and_url() {
        let state = |environment: &str| ServiceState {
            service_id: Uuid::nil(),
            environment_name: environment.into(),
            url: format!("http://web-{environment}.example.com"),
            state: "running".into(),
            active: None,
            instances: Vec::new(),
            warnings: Vec::new(),
        };
        let text = summary("web", &[state("production"), state("staging")]);
        for part in ["production", "staging", "http://web-staging.example.com", "no instances"] {
            assert!(text.contains(part), "no {part} in {text}");
        }
        assert!(summary("web", &[]).contains("not deployed in any"));
    }
}
