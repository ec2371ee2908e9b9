use std::{fs, time::Duration};

use devstack::process::ProcessIdentity;
use serde::Serialize;
use tokio::{task::JoinHandle, time::Instant};
use tokio_util::sync::{CancellationToken, DropGuard};

const INTERVAL: Duration = Duration::from_millis(100);
/// Samples from one moment of the series to the next: a second.
const PER_MOMENT: u64 = 10;
/// Of the times in `/proc`; fixed for every Linux program.
const TICKS_PER_SECOND: f64 = 100.0;

/// What a process took while it worked. A value that the system does not tell is absent.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Usage {
    pub process: String,
    /// How often it was started.
    pub lives: u32,
    /// Largest resident memory by the kernel's own record (`VmHWM`), in KiB.
    pub peak_kib: Option<u64>,
    /// Largest of the samples of `VmRSS`, in KiB.
    pub sampled_peak_kib: Option<u64>,
    pub samples: u64,
    /// Processor time since its start, in seconds.
    pub cpu_seconds: Option<f64>,
    pub series: Vec<Moment>,
}

/// Once a second.
#[derive(Debug, Clone, Serialize)]
pub struct Moment {
    /// Seconds since the watch began.
    pub at: f64,
    pub resident_kib: Option<u64>,
    pub cpu_seconds: Option<f64>,
}

/// Samples processes until it is asked for the result.
pub struct Watch {
    began: Instant,
    tasks: Vec<Watched>,
    stop: CancellationToken,
    /// Also ends them when the watch is dropped.
    _dropped: DropGuard,
}

struct Watched {
    process: String,
    /// The place of the one whose next life this is.
    continues: Option<usize>,
    task: JoinHandle<Usage>,
}

impl Watch {
    pub fn over(processes: Vec<(String, ProcessIdentity)>) -> Self {
        let stop = CancellationToken::new();
        let mut this = Self {
            began: Instant::now(),
            tasks: Vec::new(),
            _dropped: stop.clone().drop_guard(),
            stop,
        };
        for (name, identity) in processes {
            this.add(name, identity, None);
        }
        this
    }

    /// The first process of that name was started again, and is the same one in the result.
    pub fn again(&mut self, name: String, identity: ProcessIdentity) {
        let first = self.tasks.iter().position(|watched| watched.process == name);
        self.add(name, identity, first);
    }

    fn add(&mut self, process: String, identity: ProcessIdentity, continues: Option<usize>) {
        let (stop, began) = (self.stop.clone(), self.began);
        self.tasks.push(Watched {
            task: tokio::spawn(watch(process.clone(), identity, stop, began)),
            process,
            continues,
        });
    }

    /// What they took up to now; call it before they end.
    pub async fn finish(self) -> Vec<Usage> {
        self.stop.cancel();
        let mut usages: Vec<Usage> = Vec::new();
        for watched in self.tasks {
            let usage = match watched.task.await {
                Ok(usage) => usage,
                Err(panic) => std::panic::resume_unwind(panic.into_panic()),
            };
            // First lives come before all others.
            match watched.continues.and_then(|place| usages.get_mut(place)) {
                Some(before) => before.go_on(usage),
                None => usages.push(usage),
            }
        }
        usages
    }
}

/// Processor time that this process has taken, in seconds.
pub fn own_cpu_seconds() -> Option<f64> {
    cpu_seconds(&fs::read_to_string("/proc/self/stat").ok()?)
}

/// Processor time that the compiler of a Java machine has taken, in seconds, by those of its threads that run.
pub fn compiler_seconds(pid: i32) -> Option<f64> {
    let of_thread = |task: fs::DirEntry| {
        // Threads end while the list is read.
        let stat = fs::read_to_string(task.path().join("stat")).ok()?;
        stat.contains("Compiler").then(|| cpu_seconds(&stat))?
    };
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    tasks.flatten().filter_map(of_thread).reduce(|sum, thread| sum + thread)
}

async fn watch(process: String, identity: ProcessIdentity, stop: CancellationToken, began: Instant) -> Usage {
    let mut usage = Usage {
        process,
        lives: 1,
        ..Usage::default()
    };
    loop {
        let last = stop.is_cancelled();
        if !identity.is_alive() {
            return usage;
        }
        usage.sample(identity.pid, began);
        if last {
            return usage;
        }
        tokio::select! {
            () = stop.cancelled() => {}
            () = tokio::time::sleep(INTERVAL) => {}
        }
    }
}

impl Usage {
    /// The same process, started again: its processor time is added to that of its lives before.
    fn go_on(&mut self, later: Self) {
        self.peak_kib = self.peak_kib.max(later.peak_kib);
        self.sampled_peak_kib = self.sampled_peak_kib.max(later.sampled_peak_kib);
        self.samples += later.samples;
        self.lives += later.lives;
        let before = self.cpu_seconds;
        let added = |seconds: f64| seconds + before.unwrap_or_default();
        self.series.extend(later.series.into_iter().map(|moment| Moment {
            cpu_seconds: moment.cpu_seconds.map(added),
            ..moment
        }));
        self.cpu_seconds = later.cpu_seconds.map(added).or(before);
    }

    fn sample(&mut self, pid: i32, began: Instant) {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        self.peak_kib = kib(&status, "VmHWM:").or(self.peak_kib);
        let resident_kib = kib(&status, "VmRSS:");
        self.sampled_peak_kib = self.sampled_peak_kib.max(resident_kib);
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // The one counts ended threads too, in whole ticks; the other is exact.
        let taken = [cpu_seconds(&stat), scheduled_seconds(pid), self.cpu_seconds];
        self.cpu_seconds = taken.into_iter().flatten().reduce(f64::max);
        if self.samples.is_multiple_of(PER_MOMENT) {
            self.series.push(Moment {
                at: began.elapsed().as_secs_f64(),
                resident_kib,
                cpu_seconds: self.cpu_seconds,
            });
        }
        self.samples += 1;
    }
}

/// Processor time of the threads that run, in seconds: the first field of each `schedstat`, in nanoseconds.
fn scheduled_seconds(pid: i32) -> Option<f64> {
    let of_thread = |task: fs::DirEntry| {
        // Threads end while the list is read.
        let stat = fs::read_to_string(task.path().join("schedstat")).ok()?;
        let nanos: u64 = stat.split_whitespace().next()?.parse().ok()?;
        Some(nanos as f64 / 1e9)
    };
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    tasks.flatten().filter_map(of_thread).reduce(|sum, thread| sum + thread)
}

fn kib(status: &str, field: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
}

/// Fields 14 and 15: user and system time.
fn cpu_seconds(stat: &str) -> Option<f64> {
    // The name in field 2 may hold spaces and parentheses, so count from the last one.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some((user + system) as f64 / TICKS_PER_SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_and_time_are_read_as_the_kernel_writes_them() {
        let status = "Name:\tx\nVmHWM:\t   12345 kB\nVmRSS:\t    1024 kB\n";
        assert_eq!(
            (kib(status, "VmHWM:"), kib(status, "VmRSS:")),
            (Some(12_345), Some(1_024))
        );
        assert_eq!(kib("", "VmRSS:"), None);
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 100 0 0 0 150 50 0 0 20 0 1 0 5 6 7";
        assert_eq!(cpu_seconds(stat), Some(2.0));
    }

    #[test]
    fn a_process_that_was_started_again_is_one() {
        let life = |at, resident, cpu| Usage {
            process: "relay".to_owned(),
            lives: 1,
            peak_kib: Some(resident),
            sampled_peak_kib: Some(resident),
            samples: 1,
            cpu_seconds: Some(cpu),
            series: vec![Moment {
                at,
                resident_kib: Some(resident),
                cpu_seconds: Some(cpu),
            }],
        };
        let mut usage = life(0.0, 50, 2.0);
        usage.go_on(life(10.0, 40, 0.5));
        assert_eq!(
            (usage.peak_kib, usage.cpu_seconds, usage.samples),
            (Some(50), Some(2.5), 2)
        );
        assert_eq!(
            usage.series[1].cpu_seconds,
            Some(2.5),
            "the line of its processor time does not fall"
        );
    }

    #[tokio::test]
    async fn a_process_that_runs_is_seen() {
        let this = ProcessIdentity::of_self().unwrap();
        let mut watch = Watch::over(vec![
            ("twice".to_owned(), this.clone()),
            ("twice".to_owned(), this.clone()),
        ]);
        watch.again("twice".to_owned(), this);
        let usages = watch.finish().await;
        assert!(usages[0].peak_kib.unwrap() > 0, "{usages:?}");
        assert!(usages[0].cpu_seconds.unwrap() > 0.0, "{usages:?}");
        // Two instances are two; what one of them was started again as is not a third.
        let lives: Vec<u32> = usages.iter().map(|usage| usage.lives).collect();
        assert_eq!(lives, [2, 1]);
    }
}
