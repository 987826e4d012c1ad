"""The refinements: functions that improve a solution and keep its mask; one file each."""
