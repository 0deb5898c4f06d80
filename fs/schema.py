"""The state database's schema: numbered migrations; this text is the reference for every column.

The SQL function `seal(attachment id, secret)` is `stratocache.fs.secret_box.SecretBox.seal`.

Times are RFC 3339 UTC text with microseconds. JSON columns hold one object each. A migration is
applied once, in one transaction, and `PRAGMA user_version` counts those applied; never edit one
that has been released, add the next.
"""

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE images (
        number       INTEGER PRIMARY KEY AUTOINCREMENT, -- FUSE inode number follows from it; never reused
        id           TEXT NOT NULL UNIQUE,  -- Marketplace identifier, 27 base-64 digits
        state        TEXT NOT NULL CHECK (state IN ('fetching', 'verified', 'deleting')),
        size_bytes   INTEGER,               -- of the raw image; NULL until verified
        sha256       TEXT,                  -- of the raw image, hexadecimal; NULL until verified
        entry        TEXT NOT NULL,         -- JSON of the entry that was judged and fetched
        pinned       INTEGER NOT NULL DEFAULT 0 CHECK (pinned IN (0, 1)), -- 1 = never evicted
        created_at   TEXT NOT NULL,
        verified_at  TEXT,                  -- when the whole digest was proven; NULL before
        last_used_at TEXT                   -- last clone or attachment; NULL = never
    ) STRICT;

    CREATE TABLE disks (
        number     INTEGER PRIMARY KEY AUTOINCREMENT, -- as in images
        uuid       TEXT NOT NULL UNIQUE,    -- version 4, lower case; also the directory below disks/
        state      TEXT NOT NULL CHECK (state IN ('creating', 'available', 'deleting')),
        size_bytes INTEGER NOT NULL CHECK (size_bytes > 0),
        base_image TEXT,                    -- image it was cloned from, NULL = blank; an overlay needs it
        form       TEXT CHECK (form IN ('overlay', 'raw')), -- NULL until created
        owner      TEXT NOT NULL,           -- user name of the creator
        tag        TEXT NOT NULL DEFAULT '', -- free text for people, at most 40 characters
        visibility TEXT NOT NULL CHECK (visibility IN ('private', 'public')),
        kind       TEXT NOT NULL CHECK (kind IN ('machine', 'data', 'readonly')),
        volatile   INTEGER NOT NULL CHECK (volatile IN (0, 1)), -- 1 = deleted when detached
        created_at TEXT NOT NULL
    ) STRICT;
    CREATE INDEX disks_by_base ON disks (base_image);

    CREATE TABLE launches (
        instance     TEXT PRIMARY KEY,      -- id of the VM, given by whoever launches it
        operation_id TEXT NOT NULL UNIQUE REFERENCES operations (id),
        request      TEXT NOT NULL,         -- JSON of what was asked, to recognise a repetition
        state        TEXT NOT NULL CHECK (state IN ('preparing', 'active', 'ending')),
        boot_disk    TEXT,                  -- uuid of the clone; NULL until it is made
        created_at   TEXT NOT NULL
    ) STRICT;

    CREATE TABLE attachments (
        number      INTEGER PRIMARY KEY AUTOINCREMENT, -- the target id in tgtd; never reused
        id          TEXT NOT NULL UNIQUE,   -- version 4 UUID; the last part of the target's IQN
        disk_uuid   TEXT REFERENCES disks (uuid), -- exactly one of disk_uuid and image_id is set
        image_id    TEXT REFERENCES images (id),
        instance    TEXT NOT NULL,
        role        TEXT NOT NULL CHECK (role IN ('boot', 'disk', 'readonly')),
        position    INTEGER NOT NULL,       -- order within the instance, boot first
        access      TEXT NOT NULL CHECK (access IN ('rw', 'ro')),
        initiator   TEXT,                   -- only this initiator name may log in; NULL = any
        chap_username TEXT NOT NULL,
        chap_secret TEXT NOT NULL,          -- fresh per attachment; needed to rebuild the target
        state       TEXT NOT NULL CHECK (state IN ('wanted', 'ready', 'removing')),
        owner       TEXT NOT NULL,
        created_at  TEXT NOT NULL,
        CHECK ((disk_uuid IS NULL) <> (image_id IS NULL)),
        CHECK (image_id IS NULL OR access = 'ro')
    ) STRICT;
    -- the exclusive read-write attachment, enforced where no race can pass it
    CREATE UNIQUE INDEX attachments_exclusive ON attachments (disk_uuid) WHERE access = 'rw';
    CREATE UNIQUE INDEX attachments_once ON attachments (instance, disk_uuid);
    CREATE UNIQUE INDEX attachments_image_once ON attachments (instance, image_id);
    CREATE INDEX attachments_by_image ON attachments (image_id);

    CREATE TABLE operations (
        id             TEXT PRIMARY KEY,    -- version 4 UUID
        kind           TEXT NOT NULL CHECK (kind IN (
            'fetch', 'launch', 'halt', 'delete-image', 'create-disk', 'delete-disk', 'attach', 'detach'
        )),
        subject        TEXT NOT NULL,       -- image id, disk uuid, attachment id or instance
        state          TEXT NOT NULL CHECK (state IN (
            'pending', 'running', 'done', 'failed', 'cancelled'
        )),
        request        TEXT NOT NULL,       -- JSON of what was asked
        result         TEXT,                -- JSON; NULL until done
        error          TEXT,                -- JSON error record; NULL unless failed or cancelled
        progress_bytes INTEGER NOT NULL DEFAULT 0,
        total_bytes    INTEGER,             -- NULL = not known
        cancel_requested INTEGER NOT NULL DEFAULT 0 CHECK (cancel_requested IN (0, 1)),
        owner          TEXT NOT NULL,
        created_at     TEXT NOT NULL,
        updated_at     TEXT NOT NULL
    ) STRICT;
    CREATE INDEX operations_open ON operations (state) WHERE state IN ('pending', 'running');
    CREATE INDEX operations_by_subject ON operations (subject);

    CREATE TABLE events (
        number  INTEGER PRIMARY KEY AUTOINCREMENT,
        at      TEXT NOT NULL,
        kind    TEXT NOT NULL,              -- stable, dotted: image.verified, disk.created
        subject TEXT NOT NULL,              -- as in operations
        message TEXT NOT NULL               -- one sentence for people; never a secret
    ) STRICT;
    """,
    """
    CREATE TABLE snapshots (
        number     INTEGER PRIMARY KEY AUTOINCREMENT,
        id         TEXT NOT NULL UNIQUE,    -- version 4 UUID; its manifest's or its file's name
        disk_uuid  TEXT NOT NULL REFERENCES disks (uuid),
        state      TEXT NOT NULL CHECK (state IN ('creating', 'absorbing', 'available', 'deleting')),
        form       TEXT CHECK (form IN ('manifest', 'file')), -- NULL until frozen
        size_bytes INTEGER NOT NULL CHECK (size_bytes > 0), -- of the disk when it was frozen
        tag        TEXT NOT NULL DEFAULT '', -- as a disk's
        transient  INTEGER NOT NULL DEFAULT 0 CHECK (transient IN (0, 1)), -- 1 = goes with its save
        owner      TEXT NOT NULL,
        created_at TEXT NOT NULL,
        frozen_at  TEXT                     -- from when on the disk differs from it; NULL before
    ) STRICT;
    CREATE INDEX snapshots_by_disk ON snapshots (disk_uuid);

    -- manifest that an overlay reads what it does not have from: an image's or a snapshot's; NULL = none
    ALTER TABLE disks ADD COLUMN base_manifest TEXT;
    -- snapshot it was cloned from; NULL = none
    ALTER TABLE disks ADD COLUMN base_snapshot TEXT;
    -- how often what is exported of it has changed: its form, its size, all of its content
    ALTER TABLE disks ADD COLUMN generation INTEGER NOT NULL DEFAULT 0;
    -- when it was kept, though volatile, as its instance failed; NULL = it is not in quarantine
    ALTER TABLE disks ADD COLUMN quarantined_at TEXT;
    UPDATE disks SET base_manifest = base_image WHERE form IS NOT 'raw';
    CREATE INDEX disks_by_base_manifest ON disks (base_manifest);

    -- generation of the disk that the target was made of
    ALTER TABLE attachments ADD COLUMN generation INTEGER NOT NULL DEFAULT 0;

    -- operations without a list of kinds, so that a new kind needs no migration
    CREATE TEMP TABLE old_launches AS SELECT * FROM launches;
    DROP TABLE launches;
    CREATE TEMP TABLE old_operations AS SELECT * FROM operations;
    DROP TABLE operations;
    CREATE TABLE operations (
        id             TEXT PRIMARY KEY,    -- version 4 UUID
        kind           TEXT NOT NULL,       -- fetch, launch, create-disk, ...: see fs.operations
        subject        TEXT NOT NULL,       -- image id, disk uuid, snapshot id, attachment id or instance
        state          TEXT NOT NULL CHECK (state IN (
            'pending', 'running', 'done', 'failed', 'cancelled'
        )),
        request        TEXT NOT NULL,       -- JSON of what was asked
        result         TEXT,                -- JSON; NULL until done
        error          TEXT,                -- JSON error record; NULL unless failed or cancelled
        progress_bytes INTEGER NOT NULL DEFAULT 0,
        total_bytes    INTEGER,             -- NULL = not known
        cancel_requested INTEGER NOT NULL DEFAULT 0 CHECK (cancel_requested IN (0, 1)),
        owner          TEXT NOT NULL,
        created_at     TEXT NOT NULL,
        updated_at     TEXT NOT NULL
    ) STRICT;
    CREATE INDEX operations_open ON operations (state) WHERE state IN ('pending', 'running');
    CREATE INDEX operations_by_subject ON operations (subject);
    INSERT INTO operations SELECT * FROM temp.old_operations;
    CREATE TABLE launches (
        instance     TEXT PRIMARY KEY,      -- id of the VM, given by whoever launches it
        operation_id TEXT NOT NULL UNIQUE REFERENCES operations (id),
        request      TEXT NOT NULL,         -- JSON of what was asked, to recognise a repetition
        state        TEXT NOT NULL CHECK (state IN ('preparing', 'active', 'ending')),
        boot_disk    TEXT,                  -- uuid of the clone; NULL until it is made
        created_at   TEXT NOT NULL
    ) STRICT;
    INSERT INTO launches SELECT * FROM temp.old_launches;
    DROP TABLE temp.old_operations;
    DROP TABLE temp.old_launches;
    """,
    """
    -- how often it has been attached: each attachment's epoch is greater than those before
    ALTER TABLE disks ADD COLUMN epoch INTEGER NOT NULL DEFAULT 0;
    -- what is wrong with its files, a sentence; NULL = nothing that is known
    ALTER TABLE disks ADD COLUMN problem TEXT;
    CREATE INDEX disks_with_problem ON disks (problem) WHERE problem IS NOT NULL;

    DROP INDEX attachments_exclusive;
    DROP INDEX attachments_once;
    -- chap_secret, sealed: see fs.secret_box
    ALTER TABLE attachments RENAME COLUMN chap_secret TO sealed_secret;
    UPDATE attachments SET sealed_secret = seal(id, sealed_secret);
    -- which attachment of its disk it is, counted from 1; 0 = of an image
    ALTER TABLE attachments ADD COLUMN epoch INTEGER NOT NULL DEFAULT 0;
    -- for how many seconds a renewal is good, and until when; NULL = for ever
    ALTER TABLE attachments ADD COLUMN lease_s INTEGER;
    ALTER TABLE attachments ADD COLUMN lease_expires_at TEXT;
    -- attachment whose place it takes, as long as that exists, and until when at the latest
    ALTER TABLE attachments ADD COLUMN migrates TEXT;
    ALTER TABLE attachments ADD COLUMN migration_expires_at TEXT;
    -- 1 = it ends by force, and an event proves the end
    ALTER TABLE attachments ADD COLUMN fencing INTEGER NOT NULL DEFAULT 0 CHECK (fencing IN (0, 1));
    -- why it is not yet what it should be, a sentence; NULL = nothing went wrong
    ALTER TABLE attachments ADD COLUMN problem TEXT;
    UPDATE attachments SET epoch = 1 WHERE disk_uuid IS NOT NULL;
    UPDATE disks SET epoch = 1 WHERE uuid IN (SELECT disk_uuid FROM attachments);
    CREATE INDEX attachments_by_disk ON attachments (disk_uuid);
    CREATE UNIQUE INDEX attachments_once ON attachments (instance, disk_uuid)
        WHERE migrates IS NULL;
    -- one that writes, and at most one more that is about to take its place
    CREATE UNIQUE INDEX attachments_exclusive ON attachments (disk_uuid)
        WHERE access = 'rw' AND migrates IS NULL;
    CREATE UNIQUE INDEX attachments_migrating ON attachments (disk_uuid)
        WHERE migrates IS NOT NULL;
    CREATE INDEX attachments_leased ON attachments (lease_expires_at)
        WHERE lease_expires_at IS NOT NULL;

    CREATE TABLE new_launches (
        epoch        INTEGER PRIMARY KEY AUTOINCREMENT, -- greater than that of any launch before
        instance     TEXT NOT NULL UNIQUE,  -- id of the VM, given by whoever launches it
        operation_id TEXT NOT NULL UNIQUE REFERENCES operations (id),
        request      TEXT NOT NULL,         -- JSON of what was asked, to recognise a repetition
        state        TEXT NOT NULL CHECK (state IN ('preparing', 'active', 'ending')),
        boot_disk    TEXT,                  -- uuid of the clone; NULL until it is made
        lease_s      INTEGER,               -- as of attachments; runs from when it is active
        lease_expires_at TEXT,
        created_at   TEXT NOT NULL
    ) STRICT;
    INSERT INTO new_launches (instance, operation_id, request, state, boot_disk, created_at)
        SELECT instance, operation_id, request, state, boot_disk, created_at FROM launches
        ORDER BY created_at;
    DROP TABLE launches;
    ALTER TABLE new_launches RENAME TO launches;
    CREATE INDEX launches_leased ON launches (lease_expires_at)
        WHERE lease_expires_at IS NOT NULL;
    """,
    """
    -- images that are served before they are complete; the numbers, and the next one, stay
    PRAGMA defer_foreign_keys = ON;
    CREATE TEMP TABLE old_images AS SELECT * FROM images;
    CREATE TEMP TABLE old_sequence AS SELECT seq FROM sqlite_sequence WHERE name = 'images';
    DROP TABLE images;
    CREATE TABLE images (
        number       INTEGER PRIMARY KEY AUTOINCREMENT, -- FUSE inode number follows from it; never reused
        id           TEXT NOT NULL UNIQUE,  -- Marketplace identifier, 27 base-64 digits
        state        TEXT NOT NULL CHECK (state IN (
            'fetching',                     -- nobody can read it yet
            'provisional',                  -- read by chunks that an endorsed index proves; not complete
            'verified',                     -- complete, and the whole digest proven
            'rejected',                     -- complete, and the whole digest was another: disks are fenced
            'withdrawn',                    -- its catalogue took it back: no new clones; else as verified
            'deleting'
        )),
        size_bytes   INTEGER,               -- of the raw image; NULL until provisional or verified
        sha256       TEXT,                  -- of the raw image, hexadecimal; NULL until verified
        entry        TEXT NOT NULL,         -- JSON of the entry that was judged and fetched
        pinned       INTEGER NOT NULL DEFAULT 0 CHECK (pinned IN (0, 1)), -- 1 = never evicted
        created_at   TEXT NOT NULL,
        verified_at  TEXT,                  -- when the whole digest was proven; NULL before
        last_used_at TEXT                   -- last clone or attachment; NULL = never
    ) STRICT;
    INSERT INTO images SELECT * FROM temp.old_images;
    DELETE FROM sqlite_sequence WHERE name = 'images';
    INSERT INTO sqlite_sequence (name, seq) SELECT 'images', seq FROM temp.old_sequence;
    DROP TABLE temp.old_images;
    DROP TABLE temp.old_sequence;

    -- what fetching single chunks of an image cost; rows of images that are gone go too
    CREATE TABLE image_traffic (
        image_id      TEXT PRIMARY KEY,
        remote_bytes  INTEGER NOT NULL DEFAULT 0, -- moved from origins, as they sent them
        remote_wait_s REAL NOT NULL DEFAULT 0,    -- that readers waited for them, all together
        dedup_bytes   INTEGER NOT NULL DEFAULT 0, -- that other images had brought before it landed
        local_bytes   INTEGER NOT NULL DEFAULT 0, -- of the image that are here, zeros counted
        rate_bytes_s  REAL NOT NULL DEFAULT 0,    -- at which the rest came lately
        updated_at    TEXT NOT NULL
    ) STRICT;
    -- the same by disk: what was fetched because a read of it waited
    CREATE TABLE disk_traffic (
        disk_number   INTEGER PRIMARY KEY,
        remote_bytes  INTEGER NOT NULL DEFAULT 0,
        remote_wait_s REAL NOT NULL DEFAULT 0,
        updated_at    TEXT NOT NULL
    ) STRICT;
    """,
    """
    CREATE TABLE scrub (                    -- one row: what the scrubber is to do, and did
        id          INTEGER PRIMARY KEY CHECK (id = 1),
        paused      INTEGER NOT NULL DEFAULT 0 CHECK (paused IN (0, 1)),
        requested   INTEGER NOT NULL DEFAULT 0 CHECK (requested IN (0, 1)), -- 1 = begin a pass now
        position    TEXT,                   -- the last thing looked at; NULL = no pass under way
        started_at  TEXT,                   -- of the pass under way, or of the last one; NULL = none yet
        finished_at TEXT,                   -- of the last whole pass; NULL = none yet
        chunks      INTEGER NOT NULL DEFAULT 0, -- looked at in the pass that began at started_at ...
        chunk_bytes INTEGER NOT NULL DEFAULT 0,
        manifests   INTEGER NOT NULL DEFAULT 0,
        damaged     INTEGER NOT NULL DEFAULT 0, -- ... found damaged or missing, chunks and manifests
        repaired    INTEGER NOT NULL DEFAULT 0  -- ... and brought back
    ) STRICT;
    INSERT INTO scrub (id) VALUES (1);

    CREATE TABLE losses (                   -- what is damaged and could not be brought back
        name     TEXT PRIMARY KEY,          -- a chunk's digest, hexadecimal, or a manifest's name
        kind     TEXT NOT NULL CHECK (kind IN ('chunk', 'manifest')),
        found_at TEXT NOT NULL,
        images   TEXT NOT NULL,             -- JSON list: names of the manifests that need it
        reason   TEXT NOT NULL              -- one sentence for people
    ) STRICT;
    """,
    """
    -- when its catalogue last answered a question about it; NULL = not since it was fetched
    ALTER TABLE images ADD COLUMN checked_at TEXT;
    -- since when its catalogue, asked again and again, has not listed it; NULL = it did last time
    ALTER TABLE images ADD COLUMN unlisted_since TEXT;
    -- when it was withdrawn, and why, a sentence; NULL = it is not
    ALTER TABLE images ADD COLUMN withdrawn_at TEXT;
    ALTER TABLE images ADD COLUMN withdrawn_because TEXT;
    """,
    """
    -- reads of single chunks that were here, and of those that were fetched while the reader waited
    ALTER TABLE image_traffic ADD COLUMN hits INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE image_traffic ADD COLUMN hit_bytes INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE image_traffic ADD COLUMN misses INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE image_traffic ADD COLUMN miss_bytes INTEGER NOT NULL DEFAULT 0;
    -- that were here when a launch, a clone or a fetch asked for the image, each time
    ALTER TABLE image_traffic ADD COLUMN cache_saved_bytes INTEGER NOT NULL DEFAULT 0;
    -- JSON list of [second, remote bytes, remote wait in s]: the latest periods in which there were any
    ALTER TABLE image_traffic ADD COLUMN history TEXT NOT NULL DEFAULT '[]';
    ALTER TABLE disk_traffic ADD COLUMN cache_saved_bytes INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE disk_traffic ADD COLUMN history TEXT NOT NULL DEFAULT '[]';
    -- as remote_bytes and remote_wait_s, since the attachment of this epoch: of the latest boot
    ALTER TABLE disk_traffic ADD COLUMN boot_epoch INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE disk_traffic ADD COLUMN boot_remote_bytes INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE disk_traffic ADD COLUMN boot_remote_wait_s REAL NOT NULL DEFAULT 0;
    -- at which progress_bytes grew lately
    ALTER TABLE operations ADD COLUMN rate_bytes_s REAL NOT NULL DEFAULT 0;

    CREATE TABLE manifest_sizes (
        name         TEXT PRIMARY KEY,      -- of an image or a snapshot whose manifest has been read
        stored_bytes INTEGER NOT NULL       -- its chunks, each once, those of zeros left out
    ) STRICT;
    CREATE TRIGGER forget_image_size AFTER DELETE ON images BEGIN
        DELETE FROM manifest_sizes WHERE name = OLD.id;
    END;
    CREATE TRIGGER forget_snapshot_size AFTER DELETE ON snapshots BEGIN
        DELETE FROM manifest_sizes WHERE name = OLD.id;
    END;

    CREATE TABLE tallies (                  -- counters for /metrics, which only grow: api/METRICS.md
        name  TEXT NOT NULL,
        label TEXT NOT NULL DEFAULT '',
        value REAL NOT NULL,
        PRIMARY KEY (name, label)
    ) STRICT, WITHOUT ROWID;
    INSERT INTO tallies SELECT 'events', kind, count(*) FROM events GROUP BY kind;
    CREATE TRIGGER count_events AFTER INSERT ON events BEGIN
        INSERT INTO tallies VALUES ('events', NEW.kind, 1)
        ON CONFLICT (name, label) DO UPDATE SET value = value + 1;
    END;
    CREATE TRIGGER count_operations AFTER UPDATE OF state ON operations
    WHEN NEW.state IN ('done', 'failed', 'cancelled') AND OLD.state IN ('pending', 'running') BEGIN
        INSERT INTO tallies VALUES ('operations', NEW.kind || ' ' || NEW.state, 1)
        ON CONFLICT (name, label) DO UPDATE SET value = value + 1;
        INSERT INTO tallies VALUES ('operation_seconds', NEW.kind,
            max(0, (julianday(NEW.updated_at) - julianday(NEW.created_at)) * 86400.0))
        ON CONFLICT (name, label) DO UPDATE SET value = value + excluded.value;
    END;
    """,
    """
    -- since when eviction has left its boot set only, or since nobody uses that; NULL = it has not
    ALTER TABLE images ADD COLUMN skeleton_since TEXT;
    """,
    """
    -- of remote_bytes, what peers sent
    ALTER TABLE image_traffic ADD COLUMN peer_bytes INTEGER NOT NULL DEFAULT 0;

    CREATE TABLE peers (                    -- what other hosts gave us; those not configured any more go
        location       TEXT PRIMARY KEY,    -- https://ADDRESS:PORT, or a host whose name leads nowhere
        host           TEXT NOT NULL,       -- as configured, without the port
        asked          INTEGER NOT NULL DEFAULT 0, -- requests for chunks and manifests
        served         INTEGER NOT NULL DEFAULT 0, -- of them, answered with the right bytes
        failed         INTEGER NOT NULL DEFAULT 0, -- of them, not answered, late or wrong
        received_bytes INTEGER NOT NULL DEFAULT 0,
        rests_until    TEXT,                -- left alone until then; NULL = not
        fault          TEXT,                -- how it failed last; NULL = it has answered since
        updated_at     TEXT NOT NULL
    ) STRICT;

    CREATE TABLE peer_service (             -- one row: what we gave other hosts
        id           INTEGER PRIMARY KEY CHECK (id = 1),
        chunks       INTEGER NOT NULL DEFAULT 0,
        manifests    INTEGER NOT NULL DEFAULT 0,
        sent_bytes   INTEGER NOT NULL DEFAULT 0,
        absent       INTEGER NOT NULL DEFAULT 0, -- requests for what is not here, or is nobody's business
        busy         INTEGER NOT NULL DEFAULT 0, -- requests that were sent elsewhere for lack of time
        refused      INTEGER NOT NULL DEFAULT 0, -- requests without a token that we know
        updated_at   TEXT
    ) STRICT;
    INSERT INTO peer_service (id) VALUES (1);
    """,
    """
    CREATE TABLE accounts (                 -- who may come over the network; api/ACCOUNTS.md
        name                TEXT PRIMARY KEY,
        role                TEXT NOT NULL CHECK (role IN ('user', 'operator', 'admin')),
        enabled             INTEGER NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)), -- 0 = nobody is it
        password_hash       TEXT,           -- argon2id, PHC string; NULL = no log-in by password
        certificate_subject TEXT,           -- as given: a distinguished name, or sha256:HEX
        certificate_key     TEXT UNIQUE,    -- the same in one form, by which it is found
        quota_bytes         INTEGER CHECK (quota_bytes >= 0),       -- NULL = no limit, as below
        quota_disks         INTEGER CHECK (quota_disks >= 0),
        quota_attachments   INTEGER CHECK (quota_attachments >= 0),
        created_at          TEXT NOT NULL,
        last_login_at       TEXT            -- by password or certificate; NULL = never
    ) STRICT, WITHOUT ROWID;

    CREATE TABLE tokens (
        id           TEXT PRIMARY KEY,      -- version 4 UUID, by which it is spoken of
        account      TEXT NOT NULL REFERENCES accounts (name) ON DELETE CASCADE,
        digest       TEXT NOT NULL UNIQUE,  -- SHA-256 of the token, which is stored nowhere
        description  TEXT NOT NULL DEFAULT '',
        scopes       TEXT NOT NULL,         -- JSON list, see stratocache.fs.records.SCOPES
        created_at   TEXT NOT NULL,
        expires_at   TEXT,                  -- NULL = never
        last_used_at TEXT                   -- some minutes late; NULL = never
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX tokens_by_account ON tokens (account);

    CREATE TABLE sessions (                 -- of browsers
        digest     TEXT PRIMARY KEY,        -- SHA-256 of the cookie, which is stored nowhere
        account    TEXT NOT NULL REFERENCES accounts (name) ON DELETE CASCADE,
        address    TEXT NOT NULL,           -- where somebody logged in from
        created_at TEXT NOT NULL,
        expires_at TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX sessions_by_account ON sessions (account);

    CREATE TABLE first_token (              -- one row at most, as long as there is no account
        id     INTEGER PRIMARY KEY CHECK (id = 1),
        digest TEXT NOT NULL                -- SHA-256 of the token in STATE_DIR/first-token
    ) STRICT;

    CREATE TABLE login_failures (           -- of the last minutes
        key TEXT NOT NULL,                  -- name:NAME or address:ADDRESS
        at  REAL NOT NULL                   -- seconds since 1970
    ) STRICT;
    CREATE INDEX login_failures_by_key ON login_failures (key, at);

    CREATE TABLE audit (                    -- who changed what, and who was refused
        number       INTEGER PRIMARY KEY AUTOINCREMENT,
        at           TEXT NOT NULL,
        user         TEXT,                  -- NULL = nobody that we know
        address      TEXT NOT NULL,         -- IP address, or unix
        method       TEXT NOT NULL,
        action       TEXT NOT NULL,         -- such as disk.delete; stratocache.api.authorisation
        subject      TEXT NOT NULL,         -- disk, image, account…; '' = none
        outcome      TEXT NOT NULL CHECK (outcome IN ('done', 'accepted', 'refused', 'failed')),
        status       INTEGER NOT NULL,      -- of HTTP
        operation_id TEXT,
        message      TEXT NOT NULL          -- a sentence, '' when all went well; never a secret
    ) STRICT;
    CREATE INDEX audit_by_user ON audit (user, number);
    CREATE INDEX audit_by_subject ON audit (subject, number);
    CREATE TABLE audit_retention (          -- one row
        id     INTEGER PRIMARY KEY CHECK (id = 1),
        before TEXT                         -- lines of before may go, within this transaction only
    ) STRICT;
    INSERT INTO audit_retention VALUES (1, NULL);
    CREATE TRIGGER keep_audit_as_written BEFORE UPDATE ON audit BEGIN
        SELECT raise(ABORT, 'the audit log is append-only');
    END;
    CREATE TRIGGER keep_audit BEFORE DELETE ON audit
    WHEN OLD.at >= coalesce((SELECT before FROM audit_retention), '') BEGIN
        SELECT raise(ABORT, 'the audit log is append-only');
    END;
    """,
    """
    -- of the request that asked for it, as logs have it; NULL = nobody's
    ALTER TABLE operations ADD COLUMN request_id TEXT;
    """,
    """
    -- whose the subject was; NULL = nobody's, so that only operators see it (those of images all do)
    ALTER TABLE events ADD COLUMN owner TEXT;
    UPDATE events SET owner = coalesce(
        (SELECT owner FROM disks WHERE uuid = subject),
        (SELECT owner FROM attachments WHERE id = subject),
        (SELECT owner FROM snapshots WHERE id = subject),
        (SELECT owner FROM operations WHERE operations.subject = events.subject
         ORDER BY created_at LIMIT 1));
    CREATE INDEX events_by_subject ON events (subject, number);
    CREATE INDEX events_by_owner ON events (owner, number);
    CREATE INDEX operations_by_time ON operations (created_at, id);
    """,
    """
    CREATE TABLE idempotency_keys (         -- of requests of the last day: fs.idempotency
        caller       TEXT NOT NULL,         -- who sent it; keys of several callers are different ones
        key          TEXT NOT NULL,
        method       TEXT NOT NULL,
        path         TEXT NOT NULL,         -- with the query
        body_sha256  TEXT NOT NULL,
        state        TEXT NOT NULL CHECK (state IN ('running', 'done')),
        worker       TEXT NOT NULL,         -- process that took it: boot id, start time, process id
        operation_id TEXT,                  -- recorded in the transaction that made it; NULL = none yet
        status       INTEGER,               -- of the answer, as the columns below; NULL until done
        content_type TEXT,
        location     TEXT,
        etag         TEXT,
        body         BLOB,                  -- NULL = not stored, as it has a secret
        created_at   TEXT NOT NULL,
        PRIMARY KEY (caller, key)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX idempotency_keys_by_age ON idempotency_keys (created_at);
    """,
    """
    CREATE TABLE disk_shares (              -- what others than the owner may do: fs.rights
        number     INTEGER PRIMARY KEY AUTOINCREMENT,
        disk_uuid  TEXT NOT NULL REFERENCES disks (uuid) ON DELETE CASCADE,
        user       TEXT NOT NULL,           -- a name, of an account or of a Unix user
        access     TEXT NOT NULL CHECK (access IN ('read', 'write')),
        created_at TEXT NOT NULL,
        UNIQUE (disk_uuid, user)
    ) STRICT;
    CREATE INDEX disk_shares_by_user ON disk_shares (user, disk_uuid);
    -- the next who has the name is somebody else
    CREATE TRIGGER forget_account AFTER DELETE ON accounts BEGIN
        DELETE FROM disk_shares WHERE user = OLD.name;
        DELETE FROM idempotency_keys WHERE caller = OLD.name;
    END;
    -- an owner needs no share
    CREATE TRIGGER forget_share AFTER UPDATE OF owner ON disks BEGIN
        DELETE FROM disk_shares WHERE disk_uuid = NEW.uuid AND user = NEW.owner;
    END;
    CREATE INDEX disks_by_owner ON disks (owner);
    CREATE INDEX attachments_by_owner ON attachments (owner);
    """,
    """
    -- when somebody last did something in it, a minute more or less: fs.sessions
    ALTER TABLE sessions ADD COLUMN used_at TEXT NOT NULL DEFAULT '';
    UPDATE sessions SET used_at = created_at;
    """,
    """
    -- for counts of what is there, and of what one may see: fs.overview
    CREATE INDEX disks_by_state ON disks (state);
    CREATE INDEX disks_public ON disks (visibility) WHERE visibility = 'public';
    CREATE INDEX snapshots_by_state ON snapshots (state, transient);
    """,
)
