"""Does the smaller model still do the job: tasks, the user's prompts, speed, transfer, the gate."""
