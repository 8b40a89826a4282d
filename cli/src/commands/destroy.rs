//! `capsule destroy`: a service leaves one environment, or goes with all of them.

use anyhow::bail;
use capsule_contracts::Empty;
use capsule_contracts::deploy::ServiceState;
use serde_json::json;

use super::service::{self, Found, announce};
use crate::arguments::Destroy;
use crate::client::Client;
use crate::folder;
use crate::terminal::{Failure, Terminal, can_ask, confirm, table, type_name};

pub fn destroy(mut client: Client, arguments: &Destroy, terminal: Terminal) -> anyhow::Result<()> {
    let wanted = folder::known(&arguments.at)?;
    if wanted.is_environment_named && !arguments.all_environments {
        let found = service::find(&mut client, &wanted, terminal)?;
        return one_environment(&mut client, &found, arguments.yes, terminal);
    }
    let found = service::find_in_any(&mut client, &wanted, terminal)?;
    whole_service(&mut client, &found, arguments, terminal)
}

fn one_environment(client: &mut Client, found: &Found, yes: bool, terminal: Terminal) -> anyhow::Result<()> {
    let (service, environment) = (&found.service.name, &found.environment);
    let state = found.state(client)?;
    if state.state == "not_deployed" {
        let text = format!("{service} is not deployed to {environment}.");
        return Err(Failure::new("not_deployed", text).hint("`capsule status` shows another environment with -e NAME.").into());
    }
    found.announce(client, terminal);
    let question = format!("Delete {service} in {environment}, {} with {}?", state.url, instances(&state));
    if !confirm(&question, yes)? {
        bail!("Nothing was deleted.");
    }
    let _: ServiceState = client.delete(&format!("/services/{}/environments/{environment}", found.service.id))?;
    terminal.show(&json!({"deleted": found.service.id, "environment": environment}), |_| {
        format!("Deleting {service} from {environment}. Other environments are not changed.")
    })
}

fn whole_service(client: &mut Client, found: &Found, arguments: &Destroy, terminal: Terminal) -> anyhow::Result<()> {
    let name = &found.service.name;
    let mut states = Vec::new();
    for environment in &found.environments {
        let state = found.state_in(client, &environment.name)?;
        if state.state != "not_deployed" {
            states.push(state);
        }
    }
    announce(client, &found.organization, &found.project.slug, name, None, terminal);
    terminal.say(&what_goes(name, &states));
    if !(arguments.all_environments && arguments.yes) {
        if !can_ask() {
            return Err(Failure::new("not_confirmed", format!("Deleting {name} deletes it in every environment."))
                .hint("Give -e NAME to delete it in one environment, or --all-environments --yes to delete all of it.")
                .into());
        }
        if !type_name(&format!("Type {name} to delete all of it"), name)? {
            bail!("That is not its name. Nothing was deleted.");
        }
    }
    let _: Empty = client.delete(&format!("/services/{}", found.service.id))?;
    let environments: Vec<&str> = states.iter().map(|state| state.environment_name.as_str()).collect();
    terminal.show(&json!({"deleted": found.service.id, "environments": environments}), |_| format!("Deleted {name}."))
}

/// What ends with a service.
fn what_goes(name: &str, states: &[ServiceState]) -> String {
    if states.is_empty() {
        return format!("{name} is not deployed anywhere.");
    }
    let rows: Vec<_> = states
        .iter()
        .map(|state| vec![state.environment_name.clone(), state.state.clone(), state.url.clone(), instances(state)])
        .collect();
    format!("This goes with {name}:\n{}", table(&["ENVIRONMENT", "STATE", "ADDRESS", "INSTANCES"], &rows))
}

fn instances(state: &ServiceState) -> String {
    match state.instances.len() {
        0 => "no instances".into(),
        1 => "1 instance".into(),
        count => format!("{count} instances"),
    }
}

#[cfg(test)]
mod tests {
    use super::what_goes;
    use capsule_contracts::Uuid;
    use capsule_contracts::deploy::ServiceState;

    #[test]
    fn what_goes_with_a_service_is_listed_by_environment_and_address() {
        let state = |environment: &str| ServiceState {
            service_id: Uuid::nil(),
            environment_name: environment.into(),
            url: format!("http://web-{environment}.example.com"),
            state: "running".into(),
            active: None,
            instances: Vec::new(),
            warnings: Vec::new(),
        };
        let told = what_goes("web", &[state("production"), state("staging")]);
        for part in ["production", "staging", "http://web-staging.example.com", "no instances"] {
            assert!(told.contains(part), "no {part} in {told}");
        }
        assert!(what_goes("web", &[]).contains("not deployed anywhere"));
    }
}
