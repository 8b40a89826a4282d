-- How often each phase of a deployment was begun. `unfinished` counts the attempts that the server did not live to
-- see the end of, `hindered` those that ended because a part of the platform was not available.
CREATE TABLE deployment_attempts (
    deployment_id UUID NOT NULL REFERENCES deployments (id) ON DELETE CASCADE,
    organization_id UUID NOT NULL,
    phase TEXT NOT NULL,
    unfinished INTEGER NOT NULL,
    hindered INTEGER NOT NULL,
    PRIMARY KEY (deployment_id, phase)
);
ALTER TABLE deployments ADD COLUMN next_attempt_at BIGINT NOT NULL DEFAULT 0;

-- Services, environments, projects and organizations that were removed: a deployment that was asked for before its
-- service was removed, and is accepted after it, must not bring it back.
CREATE TABLE removals (
    id UUID PRIMARY KEY NOT NULL,
    organization_id UUID NOT NULL,
    removed_at BIGINT NOT NULL
);
