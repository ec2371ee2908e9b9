use sha2::{Digest, Sha256};

/// Which way the effect of an event on commerce goes. The event is written to the outbox in each of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// By the outbox alone.
    Outbox,
    /// By the outbox, while the synchronous path is tried out and rolled back, and both are compared.
    Shadow,
    /// Synchronously, in the transaction of the change. The record that comes later is a duplicate.
    Legacy,
}

impl Mode {
    pub const ALL: [Self; 3] = [Self::Outbox, Self::Shadow, Self::Legacy];

    pub fn name(self) -> &'static str {
        match self {
            Self::Outbox => "outbox",
            Self::Shadow => "shadow",
            Self::Legacy => "legacy",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.name() == name)
    }
}

/// A share of all orders, in hundredths of a percent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Share(u16);

impl Share {
    pub const ALL: Self = Self(10_000);

    /// `None` unless it is 0 to 100 with at most two decimals.
    pub fn from_percent(percent: f64) -> Option<Self> {
        let hundredths = (percent * 100.0).round();
        let is_exact = (percent * 100.0 - hundredths).abs() < 1e-6;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "checked to be 0 to 10,000"
        )]
        (is_exact && (0.0..=10_000.0).contains(&hundredths)).then_some(Self(hundredths as u16))
    }

    pub fn percent(self) -> f64 {
        f64::from(self.0) / 100.0
    }

    pub fn hundredths(self) -> u16 {
        self.0
    }

    /// `None` unless it is 0 to 10,000.
    pub fn from_hundredths(hundredths: i32) -> Option<Self> {
        u16::try_from(hundredths)
            .ok()
            .filter(|hundredths| *hundredths <= 10_000)
            .map(Self)
    }
}

/// A value of the flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flag {
    /// Raised by one with each change; 0 is the value before any was set.
    pub version: i64,
    /// Of the orders within the share.
    pub mode: Mode,
    /// Of the others.
    pub rest: Mode,
    pub share: Share,
}

impl Flag {
    /// In force until somebody sets another one.
    pub const FIRST: Self = Self {
        version: 0,
        mode: Mode::Outbox,
        rest: Mode::Outbox,
        share: Share::ALL,
    };

    /// An order has the same place each time, on every instance and in every release: with a larger share, orders only join.
    pub fn mode_of(&self, order_id: &str) -> Mode {
        if place(order_id) < self.share.0 {
            self.mode
        } else {
            self.rest
        }
    }

    /// The mode of all orders, if they have the same.
    pub fn of_all(&self) -> Option<Mode> {
        match self.share {
            Share::ALL => Some(self.mode),
            Share(0) => Some(self.rest),
            _ if self.mode == self.rest => Some(self.mode),
            _ => None,
        }
    }

    /// Whether some order may have this mode.
    pub fn has(&self, mode: Mode) -> bool {
        match self.of_all() {
            Some(all) => all == mode,
            None => self.mode == mode || self.rest == mode,
        }
    }
}

/// 0 to 9,999: the first eight bytes of the SHA-256 of the id, as a big-endian number, modulo 10,000.
fn place(order_id: &str) -> u16 {
    let hash = Sha256::digest(order_id.as_bytes());
    let number = hash
        .iter()
        .take(8)
        .fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
    (number % 10_000) as u16
}

/// Whether a character of a text that somebody else wrote may go to a terminal: it starts no line, moves no cursor, and does not turn
/// what is around it.
pub(crate) fn is_printable(character: char) -> bool {
    let turns = matches!(character, '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    !character.is_control() && !turns
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn flag(percent: f64) -> Flag {
        Flag {
            version: 1,
            mode: Mode::Legacy,
            rest: Mode::Outbox,
            share: Share::from_percent(percent).unwrap(),
        }
    }

    #[test]
    fn a_share_is_taken_evenly() {
        for percent in [1.0, 12.5, 50.0, 99.0] {
            let taken = (0..100_000).filter(|n| flag(percent).mode_of(&n.to_string()) == Mode::Legacy);
            let got = taken.count() as f64 / 1_000.0;
            assert!((got - percent).abs() < 0.5, "{percent} %: {got}");
        }
    }

    /// Another hash would move orders from one path to the other with a release.
    #[test]
    fn the_place_of_an_order_never_changes() {
        assert_eq!(["10248", "10249", "", "ü"].map(place), PLACES);
    }
    const PLACES: [u16; 4] = [8222, 6378, 1652, 3028];

    #[test]
    fn a_percentage_has_two_decimals_at_most() {
        for bad in [-0.01, 100.01, 0.001, f64::NAN, f64::INFINITY] {
            assert_eq!(Share::from_percent(bad), None, "{bad}");
        }
        assert_eq!(Share::from_percent(0.07).map(Share::hundredths), Some(7));
        assert_eq!(Share::from_percent(100.0), Some(Share::ALL));
    }

    proptest! {
        #[test]
        fn with_a_larger_share_orders_only_join(order in ".{0,20}", small in 0..=10_000_i32, more in 0..=10_000_i32) {
            let (small, large) = (small.min(more), small.max(more));
            let of = |hundredths| Flag { share: Share::from_hundredths(hundredths).unwrap(), ..flag(1.0) };
            if of(small).mode_of(&order) == Mode::Legacy {
                prop_assert_eq!(of(large).mode_of(&order), Mode::Legacy);
            }
            prop_assert_eq!(of(10_000).mode_of(&order), Mode::Legacy);
            prop_assert_eq!(of(0).mode_of(&order), Mode::Outbox);
        }
    }
}
