-- How much organizations may use, as far as this service was told. The organization service owns it.
CREATE TABLE known_quotas (
    organization_id UUID PRIMARY KEY NOT NULL,
    -- A JSON object: the names of quantities, with their limits.
    quotas TEXT NOT NULL,
    sequence BIGINT NOT NULL,
    confirmed_at BIGINT NOT NULL
);
