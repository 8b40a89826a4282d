CREATE TABLE projects (
    id UUID PRIMARY KEY NOT NULL,
    organization_id UUID NOT NULL,
    name TEXT NOT NULL,
    slug TEXT NOT NULL,
    archived_at BIGINT,
    created_at BIGINT NOT NULL,
    UNIQUE (organization_id, slug)
);

CREATE TABLE environments (
    id UUID PRIMARY KEY NOT NULL,
    organization_id UUID NOT NULL,
    project_id UUID NOT NULL REFERENCES projects (id) ON DELETE CASCADE,
    name TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('development', 'staging', 'production', 'preview', 'custom')),
    created_at BIGINT NOT NULL,
    UNIQUE (project_id, name)
);

CREATE TABLE variables (
    environment_id UUID NOT NULL REFERENCES environments (id) ON DELETE CASCADE,
    organization_id UUID NOT NULL,
    name TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (environment_id, name)
);

CREATE TABLE secrets (
    environment_id UUID NOT NULL REFERENCES environments (id) ON DELETE CASCADE,
    organization_id UUID NOT NULL,
    name TEXT NOT NULL,
    sealed_value BYTEA NOT NULL,
    PRIMARY KEY (environment_id, name)
);

CREATE TABLE services (
    id UUID PRIMARY KEY NOT NULL,
    organization_id UUID NOT NULL,
    project_id UUID NOT NULL REFERENCES projects (id) ON DELETE CASCADE,
    name TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    UNIQUE (project_id, name)
);
