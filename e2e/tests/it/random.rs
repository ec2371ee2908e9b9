use uuid::Uuid;

/// xorshift64*: a seed that is printed, so that a run can be told from it. `E2E_SEED` sets it.
pub(crate) struct Random {
    seed: u64,
    state: u64,
}

impl Random {
    pub(crate) fn new() -> Self {
        let seed = std::env::var("E2E_SEED").ok().and_then(|text| text.parse().ok());
        let seed = seed.unwrap_or_else(|| Uuid::new_v4().as_u64_pair().0 | 1);
        Self { seed, state: seed }
    }

    pub(crate) fn seed(&self) -> u64 {
        self.seed
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        (self.state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % limit
    }

    pub(crate) fn shuffle<T>(&mut self, list: &mut [T]) {
        for position in (1..list.len()).rev() {
            let other = self.below(position as u64 + 1) as usize;
            list.swap(position, other);
        }
    }
}
