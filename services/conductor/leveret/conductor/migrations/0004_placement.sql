-- Groups of VMs that are placed with regard to each other, what hosts say of whom they take, and waiting for room.

CREATE TABLE groups (
    project_id text NOT NULL REFERENCES projects,
    name text NOT NULL CHECK (name ~ '^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$'),
    policy text NOT NULL CHECK (policy IN ('spread', 'pack')),
    enforcement text NOT NULL CHECK (enforcement IN ('hard', 'soft')),
    topology text NOT NULL CHECK (topology IN ('host', 'zone')),
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (project_id, name)
);

-- A VM's place in its group. Of a group that is spread hard, every placed VM has a seat of its own, its host or its
-- zone: the index makes it impossible that two have one, whoever places them at the same time (law 4).
ALTER TABLE vms
    ADD COLUMN group_name text,
    ADD COLUMN seat text,
    -- The request that asked for several at once, all or none: those that wait for room are placed together.
    ADD COLUMN bundle uuid;
-- No row has any of that yet, so there is nothing to validate.
ALTER TABLE vms
    ADD CONSTRAINT vms_group_exists FOREIGN KEY (project_id, group_name) REFERENCES groups (project_id, name) NOT VALID,
    ADD CONSTRAINT vms_group_ends CHECK (group_name IS NULL OR state <> 'deleted') NOT VALID,
    ADD CONSTRAINT vms_seat_is_placed
        CHECK (seat IS NULL OR (group_name IS NOT NULL AND host_id IS NOT NULL)) NOT VALID;

-- A conductor that does not know of groups yet takes VMs off their hosts, and out of their groups, all the same.
CREATE OR REPLACE FUNCTION vms_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NOT vm_move_is_legal(OLD.state, NEW.state) THEN
        RAISE EXCEPTION 'vm % cannot go from % to %', OLD.id, OLD.state, NEW.state USING ERRCODE = 'LV001';
    END IF;
    IF NEW.generation < OLD.generation OR NEW.token < OLD.token THEN
        RAISE EXCEPTION 'generation or token of vm % would go back', OLD.id USING ERRCODE = 'LV002';
    END IF;
    IF NEW.host_id IS NULL THEN
        NEW.seat := NULL;
    END IF;
    IF NEW.state = 'deleted' THEN
        NEW.group_name := NULL;
    END IF;
    RETURN NEW;
END
$$;

CREATE UNIQUE INDEX vms_seat ON vms (project_id, group_name, seat) WHERE seat IS NOT NULL;
CREATE INDEX vms_waiting_bundle ON vms (bundle) WHERE bundle IS NOT NULL AND state = 'pending';
CREATE INDEX vms_group ON vms (project_id, group_name) WHERE group_name IS NOT NULL;

-- What a host says of itself beside its size: whom it repels, how many VMs it takes, and which images it has already.
ALTER TABLE hosts
    ADD COLUMN taints jsonb NOT NULL DEFAULT '{}',
    ADD COLUMN vms_max integer,
    ADD COLUMN images text[] NOT NULL DEFAULT '{}',
    -- How often room came about here: counters fell, or it was let work again. Who waits for room looks again when the
    -- sum over all hosts is another one than it was: a sum tells of what became visible late, a time would not (law 9).
    ADD COLUMN rooms bigint NOT NULL DEFAULT 1;

CREATE FUNCTION hosts_count_rooms() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.vcpus - NEW.vcpus_used > OLD.vcpus - OLD.vcpus_used
       OR NEW.memory_mib - NEW.memory_mib_used > OLD.memory_mib - OLD.memory_mib_used
       OR NEW.disk_gib - NEW.disk_gib_used > OLD.disk_gib - OLD.disk_gib_used
       OR NEW.vms_max IS DISTINCT FROM OLD.vms_max
       OR (NEW.state = 'up' AND OLD.state <> 'up')
       OR (NEW.problem IS NULL AND OLD.problem IS NOT NULL)
       OR NEW.labels <> OLD.labels OR NEW.taints <> OLD.taints OR NEW.zone <> OLD.zone
    THEN
        NEW.rooms := OLD.rooms + 1;
    END IF;
    RETURN NEW;
END
$$;
CREATE TRIGGER hosts_count_rooms BEFORE UPDATE ON hosts FOR EACH ROW EXECUTE FUNCTION hosts_count_rooms();

-- That sum, with the number of those that are to be placed together, when a VM that waits was last looked at.
ALTER TABLE vms ADD COLUMN looked_rooms bigint;

GRANT SELECT, INSERT, UPDATE, DELETE ON groups TO leveret_conductor;
GRANT SELECT ON groups TO leveret_api;
ALTER TABLE groups ENABLE ROW LEVEL SECURITY;
CREATE POLICY conductor ON groups TO leveret_conductor USING (true);
CREATE POLICY api ON groups FOR SELECT TO leveret_api USING (project_id = asked_project());
