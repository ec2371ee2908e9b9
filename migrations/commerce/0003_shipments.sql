-- What commerce knows of the warehouse's shipments.
--
-- Promises
--   * `sequence` is the last event of the shipment that took effect here; it moves forward by one per event, and an event
--     at or below it never takes effect again. This outlives the rows of `commerce.inbox` (HAZARDS H43).
--   * A shipment belongs to one order for ever.
--   * The sum of `sequence` over all shipments is the number of events that took effect.

CREATE TABLE commerce.shipments (
    -- The envelope's aggregateId.
    id              text COLLATE "C" CONSTRAINT shipments_pkey PRIMARY KEY,
    order_id        text COLLATE "C" NOT NULL,
    status          text             NOT NULL,
    sequence        bigint           NOT NULL,
    warehouse       text             NOT NULL,
    carrier         text             NOT NULL,
    tracking_number text,
    -- Of the hold in force, of the cancellation, or of the latest return.
    reason          text,
    -- Pieces in the parcel, and how many of them came back.
    units           bigint           NOT NULL,
    returned_units  bigint           NOT NULL DEFAULT 0,
    last_event_id   uuid             NOT NULL,
    last_event_type text             NOT NULL,
    -- When logistics decided the last event.
    last_event_at   timestamptz      NOT NULL,
    updated_at      timestamptz      NOT NULL DEFAULT now(),

    CONSTRAINT shipments_order_exists FOREIGN KEY (order_id) REFERENCES commerce.orders (id),
    CONSTRAINT shipments_id_length CHECK (octet_length(id) BETWEEN 1 AND 255),
    CONSTRAINT shipments_status_known CHECK (status IN ('open', 'on_hold', 'completed', 'cancelled', 'returned')),
    CONSTRAINT shipments_sequence_positive CHECK (sequence >= 1),
    CONSTRAINT shipments_units_positive CHECK (units >= 1),
    CONSTRAINT shipments_returned_within_units CHECK (returned_units BETWEEN 0 AND units),
    CONSTRAINT shipments_tracked_once_shipped CHECK ((status IN ('completed', 'returned')) = (tracking_number IS NOT NULL))
) WITH (fillfactor = 80);
CREATE INDEX shipments_order ON commerce.shipments (order_id, id);

GRANT SELECT, INSERT ON commerce.shipments TO commerce_svc;
GRANT UPDATE (status, sequence, carrier, tracking_number, reason, units, returned_units, last_event_id, last_event_type,
              last_event_at, updated_at) ON commerce.shipments TO commerce_svc;
