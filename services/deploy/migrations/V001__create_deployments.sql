-- Source archives. The bytes are a blob, named by its digest.
CREATE TABLE uploads (
    id UUID PRIMARY KEY NOT NULL,
    organization_id UUID NOT NULL,
    service_id UUID NOT NULL,
    digest TEXT,
    bytes BIGINT NOT NULL,
    created_at BIGINT NOT NULL
);

-- A service in an environment: what ought to run there.
CREATE TABLE placements (
    service_id UUID NOT NULL,
    environment_id UUID NOT NULL,
    organization_id UUID NOT NULL,
    project_id UUID NOT NULL,
    service_name TEXT NOT NULL,
    environment_name TEXT NOT NULL,
    -- Unique in the installation: its first label is the service's and the environment's name.
    host TEXT NOT NULL UNIQUE,
    -- The user id that its builds and instances run under.
    uid INTEGER NOT NULL UNIQUE,
    wanted TEXT NOT NULL CHECK (wanted IN ('running', 'stopped', 'removed')),
    active_deployment_id UUID,
    PRIMARY KEY (service_id, environment_id)
);
CREATE INDEX placements_of_project ON placements (project_id);

CREATE TABLE deployments (
    id UUID PRIMARY KEY NOT NULL,
    organization_id UUID NOT NULL,
    service_id UUID NOT NULL,
    environment_id UUID NOT NULL,
    number BIGINT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('pending', 'building', 'deploying', 'running', 'failed', 'cancelled', 'superseded')),
    phase TEXT NOT NULL,
    trigger_kind TEXT NOT NULL,
    upload_digest TEXT NOT NULL,
    -- The deployment whose release it runs: itself, or an earlier one.
    release_id UUID NOT NULL,
    plan TEXT,
    -- The variables and secrets it was made with, sealed.
    sealed_environment BYTEA NOT NULL,
    cancelling BOOLEAN NOT NULL,
    error TEXT,
    created_by UUID NOT NULL,
    created_at BIGINT NOT NULL,
    finished_at BIGINT,
    UNIQUE (service_id, environment_id, number)
);
CREATE INDEX deployments_unsettled ON deployments (id) WHERE finished_at IS NULL;

CREATE TABLE deployment_events (
    deployment_id UUID NOT NULL REFERENCES deployments (id) ON DELETE CASCADE,
    organization_id UUID NOT NULL,
    at BIGINT NOT NULL,
    status TEXT NOT NULL,
    phase TEXT NOT NULL,
    message TEXT NOT NULL
);
CREATE INDEX deployment_events_of ON deployment_events (deployment_id, at);

-- Instances, written before they are started. `gone` ones are kept for their logs.
CREATE TABLE instances (
    id TEXT PRIMARY KEY NOT NULL,
    organization_id UUID NOT NULL,
    service_id UUID NOT NULL,
    environment_id UUID NOT NULL,
    deployment_id UUID NOT NULL,
    process TEXT NOT NULL,
    port INTEGER NOT NULL,
    role TEXT NOT NULL CHECK (role IN ('candidate', 'serving', 'retiring', 'gone')),
    created_at BIGINT NOT NULL
);
CREATE INDEX instances_of ON instances (service_id, environment_id);
CREATE INDEX instances_live ON instances (role) WHERE role <> 'gone';

-- The revision of the routing table, raised by each change to what it is made from.
CREATE TABLE routing (
    id INTEGER PRIMARY KEY NOT NULL CHECK (id = 1),
    revision BIGINT NOT NULL
);
INSERT INTO routing (id, revision) VALUES (1, 1);
