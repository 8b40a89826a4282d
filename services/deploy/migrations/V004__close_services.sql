-- Services that are being deleted: nothing of them is deployed any more.
CREATE TABLE closed_services (
    service_id UUID PRIMARY KEY NOT NULL,
    organization_id UUID NOT NULL,
    closed_at BIGINT NOT NULL
);
