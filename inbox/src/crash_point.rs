//! Places between durable steps at which a test can end the process, by name: `INBOX_CRASH_AT=redirect.acknowledged@3`
//! ends it the third time that the place is reached, as `kill -9` would: nothing is dropped, flushed or said goodbye to.
//!
//! Only builds with debug assertions have them; in a release build reaching one is nothing.

/// A place of this name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CrashPoint(&'static str);

macro_rules! crash_points {
    ($($(#[$meaning:meta])* $constant:ident = $name:literal;)*) => {
        $($(#[$meaning])* pub const $constant: CrashPoint = CrashPoint($name);)*
        /// All of them, each path in the order of its steps.
        #[cfg(debug_assertions)]
        pub const ALL: &[CrashPoint] = &[$($constant),*];
    };
}

crash_points! {
    // A batch, from its records to their offsets.
    /// Before its transaction.
    BATCH_RECEIVED = "batch.received";
    /// The inbox rows are inserted.
    CLAIM_AFTER = "claim.after";
    /// The handler has answered.
    EFFECT_AFTER = "effect.after";
    /// The rows of dead letters are written, by a worker or the releaser.
    LETTER_AFTER = "letter.after";
    /// Keys are held, by a worker or the releaser.
    HOLD_AFTER = "hold.after";
    /// Events are parked.
    PARK_AFTER = "park.after";
    COMMIT_BEFORE = "commit.before";
    COMMIT_AFTER = "commit.after";
    /// The rows of records that are no events are written.
    BURY_COMMIT_BEFORE = "bury.commit.before";
    BURY_COMMIT_AFTER = "bury.commit.after";
    /// Records for a retry or dead-letter topic are in the producer's hands, a worker's or the releaser's.
    REDIRECT_SENT = "redirect.sent";
    /// The broker has acknowledged all that a batch sends on.
    REDIRECT_ACKNOWLEDGED = "redirect.acknowledged";
    /// The worker is done with the batch.
    OFFSET_FINISHED = "offset.finished";
    /// The client will commit the offset.
    OFFSET_STORED = "offset.stored";
    /// The broker has it.
    OFFSET_COMMITTED = "offset.committed";
    /// Partitions leave, their workers do not know yet.
    REVOKE_ENTER = "revoke.enter";
    /// The workers have ended.
    REVOKE_DRAINED = "revoke.drained";
    /// Their last offsets are stored.
    REVOKE_STORED = "revoke.stored";

    // Parked events leave.
    /// A key that is let go is locked.
    RELEASE_LOCKED = "release.locked";
    /// The inbox rows of its first events are inserted.
    RELEASE_CLAIMED = "release.claimed";
    /// What could take effect has, the rest is held.
    RELEASE_COMMIT_BEFORE = "release.commit.before";
    RELEASE_COMMIT_AFTER = "release.commit.after";
    /// One has failed and holds its key; its record is not sent yet.
    RELEASE_FAILED = "release.failed";
    /// Its record is acknowledged; it is parked still.
    RELEASE_ACKNOWLEDGED = "release.acknowledged";
    RELEASE_UNPARK_BEFORE = "release.unpark.before";
    RELEASE_UNPARK_AFTER = "release.unpark.after";

    // What operators do.
    /// The letters to let go are locked, by a decision or a job's step.
    LETTERS_LOCKED = "letters.locked";
    /// They are parked and their keys are let go; the decision is not in the audit yet.
    DECIDE_PARKED = "decide.parked";
    DECIDE_COMMIT_BEFORE = "decide.commit.before";
    DECIDE_COMMIT_AFTER = "decide.commit.after";
    /// A job has its letters; neither it nor its audit is written yet.
    JOB_TAKEN = "job.taken";
    JOB_COMMIT_BEFORE = "job.commit.before";
    JOB_COMMIT_AFTER = "job.commit.after";
    /// A job's next letters are let go and marked.
    STEP_SENT = "step.sent";
    STEP_COMMIT_BEFORE = "step.commit.before";
    STEP_COMMIT_AFTER = "step.commit.after";
    CANCEL_COMMIT_BEFORE = "cancel.commit.before";
    CANCEL_COMMIT_AFTER = "cancel.commit.after";
    /// A pause or a limit, with its audit.
    CHANGE_COMMIT_BEFORE = "change.commit.before";
    CHANGE_COMMIT_AFTER = "change.commit.after";
}

impl CrashPoint {
    pub const fn name(self) -> &'static str {
        self.0
    }

    #[cfg(not(debug_assertions))]
    pub(crate) const fn reached(self) {}

    /// Ends the process if this is the place and the time that the environment names.
    #[cfg(debug_assertions)]
    pub(crate) fn reached(self) {
        armed::reached(self);
    }
}

#[cfg(debug_assertions)]
pub use armed::{InvalidCrashPoint, VARIABLE, arm};

#[cfg(debug_assertions)]
mod armed {
    use std::{
        str::FromStr,
        sync::{
            OnceLock,
            atomic::{AtomicU32, Ordering},
        },
    };

    use super::{ALL, CrashPoint};

    /// Names the place, and after an `@` how often it has to be reached; once without.
    pub const VARIABLE: &str = "INBOX_CRASH_AT";

    /// Of the process, because its death is: empty unless the variable is set.
    static ARMED: OnceLock<Armed> = OnceLock::new();

    struct Armed {
        point: CrashPoint,
        left: AtomicU32,
    }

    #[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
    pub enum InvalidCrashPoint {
        #[error("{VARIABLE}: there is no crash point {0:?}; there are {names}", names = names())]
        Unknown(String),
        #[error("{VARIABLE}: {0:?} is not how often it is to be reached: expected a whole number from 1")]
        Times(String),
    }

    fn names() -> String {
        ALL.iter().map(|point| point.name()).collect::<Vec<_>>().join(", ")
    }

    impl FromStr for Armed {
        type Err = InvalidCrashPoint;

        fn from_str(text: &str) -> Result<Self, InvalidCrashPoint> {
            let (name, times) = text.split_once('@').unwrap_or((text, "1"));
            let point = ALL.iter().find(|point| point.name() == name);
            let point = *point.ok_or_else(|| InvalidCrashPoint::Unknown(name.to_owned()))?;
            match times.parse() {
                Ok(times @ 1..) => Ok(Self {
                    point,
                    left: AtomicU32::new(times),
                }),
                _ => Err(InvalidCrashPoint::Times(times.to_owned())),
            }
        }
    }

    /// Takes the place from the environment.
    ///
    /// # Errors
    /// [`InvalidCrashPoint`], so that a test never passes because it named nothing.
    pub fn arm() -> Result<(), InvalidCrashPoint> {
        if let Some(text) = std::env::var_os(VARIABLE) {
            let armed = text.to_string_lossy().parse()?;
            ARMED.get_or_init(|| armed);
        }
        Ok(())
    }

    #[expect(clippy::print_stderr, reason = "nothing that buffers would be heard")]
    pub(super) fn reached(point: CrashPoint) {
        if let Some(armed) = ARMED.get()
            && armed.point == point
            && armed.left.fetch_sub(1, Ordering::Relaxed) == 1
        {
            eprintln!("died at crash point {}", point.name());
            std::process::abort();
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        fn armed(text: &str) -> Result<(CrashPoint, u32), InvalidCrashPoint> {
            let armed: Armed = text.parse()?;
            Ok((armed.point, armed.left.into_inner()))
        }

        #[test]
        fn a_misspelt_name_or_number_is_refused() {
            assert_eq!(armed("claim.after"), Ok((super::super::CLAIM_AFTER, 1)));
            assert_eq!(armed("claim.after@3"), Ok((super::super::CLAIM_AFTER, 3)));
            let unknown = armed("claim.afterwards").expect_err("no such point");
            assert!(unknown.to_string().contains("batch.received, claim.after"), "{unknown}");
            for wrong in [
                "claim.after@",
                "claim.after@0",
                "claim.after@-1",
                "claim.after@x",
                "@1",
                "",
            ] {
                assert!(armed(wrong).is_err(), "{wrong:?}");
            }
        }

        #[test]
        fn no_two_have_one_name() {
            let mut names: Vec<&str> = ALL.iter().map(|point| point.name()).collect();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), ALL.len());
        }
    }
}
