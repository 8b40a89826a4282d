-- What counts towards an organization's quotas within a day, whatever becomes of it: a deleted service gives no
-- builds back.
CREATE TABLE quota_uses (
    -- Of the deployment or upload that it is.
    id UUID PRIMARY KEY NOT NULL,
    organization_id UUID NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('build', 'deployment', 'upload')),
    -- Bytes of an upload; otherwise 1.
    amount BIGINT NOT NULL,
    at BIGINT NOT NULL
);
CREATE INDEX quota_uses_of ON quota_uses (organization_id, at);
CREATE INDEX quota_uses_at ON quota_uses (at);

-- The memory limit that an instance was started with; null for those of earlier versions.
ALTER TABLE instances ADD COLUMN memory_bytes BIGINT;
CREATE INDEX instances_of_organization ON instances (organization_id) WHERE role <> 'gone';

-- Hosts of what was removed: nobody but the organization that had one may take it before it is free.
CREATE TABLE host_quarantine (
    host TEXT PRIMARY KEY NOT NULL,
    organization_id UUID NOT NULL,
    free_at BIGINT NOT NULL
);

-- The host of a removed placement, whose files are still to be removed; its own may be taken again.
ALTER TABLE placements ADD COLUMN former_host TEXT;
