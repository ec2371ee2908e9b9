use std::{process::ExitCode, time::Duration};

use service_runtime::supervise::Supervisor;

const DEADLINE: Duration = Duration::from_secs(20);

/// HAZARDS H82: whatever way a task ends, the others are told to stop and the process ends with a failure.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_fails_panics_or_ends_unasked_stops_the_process() {
    for how in ["fails", "panics", "ends"] {
        let mut supervisor = Supervisor::new();
        let stop = supervisor.stop_token();
        supervisor.spawn("other", async move {
            stop.cancelled().await;
            Ok(())
        });
        supervisor.spawn("first", async move {
            match how {
                "fails" => anyhow::bail!("on purpose"),
                "panics" => panic!("on purpose"),
                _ => Ok(()),
            }
        });
        let ended = tokio::time::timeout(DEADLINE, supervisor.run(DEADLINE))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(format!("{ended:?}"), format!("{:?}", ExitCode::FAILURE), "{how}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_does_not_stop_is_left_behind_at_the_deadline() {
    let mut supervisor = Supervisor::new();
    supervisor.spawn("stuck", std::future::pending());
    supervisor.spawn("first", async { anyhow::bail!("on purpose") });
    let ended = tokio::time::timeout(DEADLINE, supervisor.run(Duration::from_millis(50)))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(format!("{ended:?}"), format!("{:?}", ExitCode::FAILURE));
}
